"""Search the recipe of the book's autoencoders on scenes made for choosing (`artefacts/sae/search.py`).

The question: which settings make latents that are worth looking at? Every candidate is trained on the same
cached tokens and measured on *validation* scenes, which no autoencoder is trained on and no page reports;
test scenes are seen by the chapters alone, with the recipe that was chosen.

The rule, written before the runs. A candidate passes if its L0 is at most 0.2 times the width, as the
paper's is, its rows moved (mean cosine with their start at most .5), its FVU is below that of as many
principal components, and it keeps 95 % of the accuracy. Of those that pass, or of all if none does, the
one whose latents' references most often show one concept (purity, any object). The ReLU one so chosen
is the main autoencoder, as in the paper; the TopK one stands beside it. All that was tried is in
`search.csv`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

from patchbook.chapters.against_untrained import Learned, measure
from patchbook.chapters.probes import open_probes
from patchbook.scales import scale
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval
from patchsae.runs.jobs import workers
from patchsae.runs.stage import project_root, write_atomic
from patchsae.sae.model import SAE, SAEConfig
from patchsae.training.trainer import TrainConfig, train_sae

HERE = Path(__file__).parent
DIFFERENT = 6_000  # training images whose tokens are cached
COMMON = TrainConfig(
    images=36_000, token_batch=512, lr=1e-3, warmup_steps=200, decay_from=0.3, log_every=500
)  # fmt: skip
RELU = {"expansion": 8}
TOPK = {"expansion": 8, "activation": "topk", "l1": 0.0}
# settings of SAEConfig, and how many times as long as the others it is trained
CANDIDATES: dict[str, tuple[dict, int]] = {
    "ReLU, λ 5e-4": (RELU | {"l1": 5e-4}, 1),
    "ReLU, λ 1e-3": (RELU | {"l1": 1e-3}, 1),
    "ReLU, λ 2e-3": (RELU | {"l1": 2e-3}, 1),
    "TopK 4": (TOPK | {"k": 4}, 1),
    "TopK 8": (TOPK | {"k": 8}, 1),
    "TopK 16": (TOPK | {"k": 16}, 1),
    "ReLU, λ 7e-4, three times as long": (RELU | {"l1": 7e-4}, 3),
    "ReLU, λ 1e-3, three times as long": (RELU | {"l1": 1e-3}, 3),
    "TopK 16, three times as long": (TOPK | {"k": 16}, 3),
}


def main(arguments: list[str] | None = None) -> int:
    """Train every candidate, measure all of them in one pass, write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="*", metavar="NAME", help="candidates; by default all")
    add("--images", type=int, default=COMMON.images, help="images each is trained on, with repetition")
    add("--different", type=int, default=DIFFERENT, help="different ones among them")
    add("--scored", type=int, default=900, help="validation scenes")
    add("--references", type=int, default=4_000, help="training scenes that latents are described on")
    add("--jobs", type=int, default=2, help="trained at a time, each in a process of its own")
    add("--out", type=Path, default=HERE / "search.csv", help="the table")
    add("--work", type=Path, default=project_root() / "results" / "search", help="folder for runs")
    given = parser.parse_args(arguments)
    names = given.only or list(CANDIDATES)
    try:
        if unknown := set(names) - set(CANDIDATES):
            known = "; ".join(CANDIDATES)
            raise PatchSAEError(f"--only: {', '.join(sorted(unknown))} unknown; choose of {known}.")
        size = (given.images, given.different, given.work)
        for wave in filter(None, (names[:1], names[1:])):  # the first fills the cache of the others
            with workers(min(given.jobs, len(wave))) as run:
                run("training", learn, [(name, *size) for name in wave])
        saes = {name: learn(name, *size) for name in names}
        backbone = scale("embedded").backbone()
        probes = open_probes(backbone, given.scored, given.references, "train")
        starts = {name: SAE(sae.config, COMMON.seed) for name, sae in saes.items()}
        found = measure(saes, backbone, probes, starts, others=None)
    except PatchSAEError as error:
        print(error, file=sys.stderr)
        return 2
    write_table(given.out, [row(name, found[name]) for name in names])
    print(given.out.read_text("utf-8"))
    return 0


def learn(name: str, images: int, different: int, work: Path) -> SAE:
    """Train a candidate, or find it in the folder of runs."""
    setup = scale("embedded")
    backbone = setup.backbone()
    sae, times = CANDIDATES[name]
    config = replace(COMMON, images=times * images, cache=str(work))
    few = setup.sets(backbone, "").train.sample(different)
    return train_sae(few, backbone, SAEConfig(backbone.d_model, **sae), config, work, progress=False).sae


def row(name: str, found: Learned) -> dict[str, str]:
    """Write what the rule asks and what a reader wants to know of a candidate."""
    values = {
        "cosine with start": found.decoder,
        "L0": found.l0,
        "FVU": found.fvu,
        "FVU of PCA": found.pca,
        "living": found.living,
        "accuracy kept": found.kept,
        "purity": found.any_purity.mean,
        "purity untrained": found.any_purity.untrained,
        "latents above .5": found.any_purity.half,
        "purity by label": found.purity.mean,
        "pointing − untrained": found.pointing.ahead,
        "… two or more objects": found.pointing_several.ahead,
        "AP − untrained": found.precision.ahead,
    }
    numbers = {
        key: "" if v is None else f"{v.value if isinstance(v, Interval) else v:.3f}"
        for key, v in values.items()
    }
    return {"candidate": name} | numbers


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """Write the table as CSV."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    write_atomic(path, write)


if __name__ == "__main__":
    sys.exit(main())
