"""Train the autoencoders of this folder again where they are missing (`make saes`).

Tokens are computed once into a cache under the work folder; a run that was stopped goes on. An autoencoder
whose inputs have not changed stays as it is; after a change of the small CLIP, the scenes or a recipe the
same command makes anew what no longer fits. What each is trained from is in `patchbook.recipes`; files are
in half precision and their cards tell recipe, measurements and licence.

    python artefacts/sae/train.py --only main block2 --jobs 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from patchbook.recipes import Plan, book_plan, card_of, measure, recipes, tiny_plan
from patchbook.shipped import load_shipped, publish, put, read_index
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.hub import CARD_PAGE
from patchsae.runs.jobs import workers
from patchsae.runs.stage import project_root, write_atomic
from patchsae.sae.sharing import CARD, model_card
from patchsae.training.trainer import train_sae, training_digest

HERE = Path(__file__).parent
LIMIT = 20e6  # bytes of all weights together


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there yet, then write the index; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="*", metavar="NAME", help="which; by default all")
    add("--jobs", type=int, default=2, help="trained at a time, each in a process of its own; default 2")
    add("--tiny", action="store_true", help="a few images each, to see that all of them run")
    add("--out", type=Path, default=HERE, help="folder for the autoencoders; by default this one")
    add("--work", type=Path, default=project_root() / "results" / "saes", help="folder for runs and tokens")
    add("--force", action="store_true", help="write also what is there and fits")
    given = parser.parse_args(arguments)
    try:
        return _make(given)
    except PatchSAEError as error:
        print(error, file=sys.stderr)
        return 2


def _make(given: argparse.Namespace) -> int:
    known = recipes(_plan(given.tiny), given.work)
    names = given.only or list(known)
    if unknown := set(names) - set(known):
        raise PatchSAEError(f"--only: {', '.join(sorted(unknown))} unknown; choose of {', '.join(known)}.")
    # the first alone: it fills the cache that the others read
    waves = (names[:1], names[1:])
    for wave in filter(None, waves):
        with workers(min(given.jobs, len(wave))) as run:
            run("training", train_one, [(n, given.tiny, given.out, given.work, given.force) for n in wave])
    if not given.only:
        for left in set(read_index(given.out)) - set(known):  # a recipe that is no more
            shutil.rmtree(given.out / left, ignore_errors=True)
    publish(names, given.out, keep=bool(given.only))
    size = sum(file.stat().st_size for file in given.out.glob("*/*.safetensors"))
    print(f"{len(names)} autoencoders in '{given.out}', {size / 1e6:.1f} MB of weights in all")
    if size > LIMIT:
        print(f"that is more than {LIMIT / 1e6:.0f} MB: take fewer latents", file=sys.stderr)
        return 1
    return 0


def _plan(tiny: bool) -> Plan:
    return tiny_plan() if tiny else book_plan()


def train_one(name: str, tiny: bool, out: Path, work: Path, force: bool) -> None:
    """Train one autoencoder by its recipe and write its artefact, unless it is there and fits."""
    plan = _plan(tiny)
    recipe = recipes(plan, work)[name]()
    task = recipe.task
    inputs = training_digest(task.images, recipe.backbone, task.sae, task.train)
    if not force and _fits(name, inputs, out):
        return
    trained = train_sae(task.images, recipe.backbone, task.sae, task.train, work, progress=False)
    seconds = json.loads((trained.folder / "manifest.json").read_text("utf-8"))["seconds"]
    sets = plan.scale.sets(recipe.backbone, "")
    measured = measure(recipe, trained, sets, plan.scale, plan, str(work))
    here = put(name, trained, inputs, card_of(recipe, trained, measured, seconds), out)
    write_atomic(here / CARD_PAGE, lambda path: path.write_text(model_card(here), "utf-8"))
    shown = ", ".join(f"{key} {measured[key]:.3g}" for key in ("fvu", "fvu_pca", "l0", "cosine_with_start"))
    print(f"{name}: {shown}, {out / name / CARD}", flush=True)


def _fits(name: str, inputs: str, out: Path) -> bool:
    if read_index(out).get(name, {}).get("inputs") != inputs:
        return False
    try:
        load_shipped(name, out)
    except PatchSAEError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
