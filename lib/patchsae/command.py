"""The command `patchsae`: from files to results, without writing Python.

Each command is a function whose parameters are the options; their types, defaults and explanations are what
`--help` shows. Other packages add commands as entry points of the group `patchsae.commands`, functions of a
list of words that return an exit code: so the book has `run`, `train` and `prompts`, and the engine does
not know it. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from patchsae.runs.errors import PatchSAEError

if TYPE_CHECKING:
    from patchsae.clip.backbone import Backbone

GROUP = "patchsae.commands"
EXIT = "Exit code: 0 done; 1 something is missing or wrong; 2 bad input."
MODEL, PRETRAINED = "ViT-B-16-quickgelu", "openai"


Source = Positional[Annotated[Path, arg(metavar="SOURCE")]]
Out = Positional[Annotated[Path, arg(metavar="OUT")]]


def explore(
    *,
    images: str,
    sae: str | None = None,
    model: str = MODEL,
    pretrained: str | None = None,
    block: int | None = None,
    gallery: int = 12,
    classes: tuple[str, ...] = (),
    out: Path = Path("explorer.html"),
    results: Path = Path("results"),
    device: str = "cpu",
    quiet: bool = False,
    expansion: float | None = None,
    activation: str | None = None,
    k: int | None = None,
    l1: float | None = None,
    seen: int | None = None,
    token_batch: int | None = None,
    seed: int | None = None,
) -> int:
    """Write a page on which the latents of an autoencoder can be looked at on your pictures.

    Without --sae one is trained on them first. What was computed before is read again. What the page loads
    lies beside it, in a folder whose name ends in _files: move both together.

    Parameters
    ----------
    images
        folder of pictures, or of folders that are classes; shards.tar, torchvision:SET:FOLDER or
        datasets:NAME
    sae
        folder or file of a trained autoencoder, or hf:organisation/name, or patchsae:sae/main
    model
        open_clip model name, timm:name, folder of a model, hf:organisation/name, or patchsae:small_clip
    pretrained
        tag or weights file of a model given by name (for the default model: openai)
    block
        block whose output is decomposed, from 1 (None: the last but one)
    gallery
        pictures to choose from on the page, 1 or more
    classes
        names that the model chooses from (none: the folders')
    out
        the page, a file that ends in .html
    results
        folder of what is computed
    device
        cpu or cuda
    quiet
        no progress bars
    expansion
        training: latents per dimension, above 0 (None: 16)
    activation
        training: relu, topk or batchtopk (None: relu)
    k
        training: active latents per token, from 1, for topk and batchtopk
    l1
        training: weight of the L1 penalty, 0 or more (None: 8e-5)
    seen
        training: pictures seen, counted with repetition (None: each once)
    token_batch
        training: tokens per step, 1 or more
    seed
        training: seed of weights and order (None: 0)
    """
    from patchsae import lens
    from patchsae.explorer.widget import page_path

    training = {"expansion": expansion, "activation": activation, "k": k, "l1": l1, "images": seen}
    training |= {"token_batch": token_batch, "seed": seed}
    training = {name: value for name, value in training.items() if value is not None}
    if sae and training:
        name = {"images": "seen"}.get(next(iter(training)), next(iter(training))).replace("_", "-")
        raise PatchSAEError(
            f"--{name} is for training, but --sae gives a trained autoencoder: leave out one of the two."
        )
    page = page_path(out)  # before an hour of training
    lens.look_for_images(images)
    clip = _clip(model, pretrained, block, device)
    pictures = lens.open_images(images, clip)
    if sae:
        opened = lens.load_sae(sae, clip)
    else:
        opened = lens.train(clip, pictures, results, progress=not quiet, **{"expansion": 16} | training)
    lens.explore(opened, pictures, results, gallery, not quiet, classes).save(page)
    print(f"{opened.sae.d_sae:,} latents on {len(pictures):,} pictures: open {page.resolve().as_uri()}")
    return 0


def _clip(model: str, pretrained: str | None, block: int | None, device: str) -> Backbone:
    from patchsae.clip.backbone import load_backbone
    from patchsae.clip.files import find_clip

    if model == MODEL and pretrained is None:
        pretrained = PRETRAINED
    if not find_clip(model, pretrained).has_weights:
        raise PatchSAEError(
            f"--model {model} alone has random weights: give --pretrained, a tag such as 'openai' or a "
            "file."
        )
    clip = load_backbone(model, pretrained, block=block or 0, device=device)
    return clip if block is not None else clip.at_block(max(1, clip.n_blocks - 1))


def data(*, data: Path, check: tuple[str, ...] = (), download: tuple[str, ...] = ()) -> int:
    """Tell which benchmarks are complete under a folder laid out as CoOp asks, and what the others lack.

    Parameters
    ----------
    data
        folder that holds one folder per data set
    check
        names of data sets to check (none: the eleven benchmarks)
    download
        names of data sets whose images torchvision fetches and puts in place, before they are
        checked; the split file must be fetched by hand
    """
    from patchsae.images.benchmark_sets import check_sets

    return check_sets(data, check, download)


def import_(source: Source, out: Out, *, layout: str | None = None) -> int:
    """Convert another project's autoencoder into a folder that `load_sae` reads; nothing in it is run.

    Parameters
    ----------
    source
        a file or folder as published by PatchSAE, SAELens, saev, sparsify, Prisma, dictionary_learning
    out
        folder where sae.json and sae.safetensors go
    layout
        whose layout it is (None: recognised)
    """
    from patchsae.sae.importers import import_sae

    if out.resolve() in (source.resolve(), source.resolve().parent):
        # sparsify's weights have the name of ours
        raise PatchSAEError(f"{out} holds the source, which could be overwritten: name another folder.")
    sae = import_sae(source, layout)
    sae.save(out)
    print(f"{out}: {sae.d_sae} latents of width {sae.d_in}, {sae.config.activation}")
    return 0


def export(source: Source, out: Out) -> int:
    """Write an autoencoder as SAELens reads it: cfg.json and sae_weights.safetensors.

    Parameters
    ----------
    source
        folder of an autoencoder that was trained or imported here
    out
        another folder, where the two files go
    """
    from patchsae.sae.importers import export_saelens
    from patchsae.sae.model import SAE

    if out.resolve() == source.resolve():
        raise PatchSAEError(f"{out} is the source: name another folder.")
    print(f"{export_saelens(SAE.load(source), out)}: as SAELens reads it")
    return 0


def push(folder: Source, to: Positional[str], *, licence: str | None = None, private: bool = False) -> int:
    """Give an autoencoder to others with a model card: to the Hugging Face hub, or into a folder.

    Parameters
    ----------
    folder
        folder of an autoencoder that was trained or imported here
    to
        hf:organisation/name, or a folder
    licence
        of the weights, as the hub names it (None: the card's, or other)
    private
        make a repository that only you can see
    """
    from patchsae.sae import sharing

    print(sharing.push(folder, to, licence, private))
    return 0


def pull(source: Positional[str], out: Out) -> int:
    """Bring an autoencoder that others gave, checked: from the Hugging Face hub, or from a folder.

    Parameters
    ----------
    source
        hf:organisation/name, or a folder
    out
        folder where it goes
    """
    from patchsae.sae import sharing

    print(sharing.pull(source, out))
    return 0


def check(folder: Positional[Path] = Path("results")) -> int:
    """Tell whether every finished result in and below a folder is as it was made.

    Parameters
    ----------
    folder
        of results
    """
    from patchsae.runs.verify import verify_results

    problems = verify_results(folder)
    print("\n".join(problems) or f"{folder}: every finished result is as it was made")
    return int(bool(problems))


OWN: dict[str, Callable[..., int]] = {
    "explore": explore,
    "data": data,
    "import": import_,
    "export": export,
    "push": push,
    "pull": pull,
    "check": check,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1, or 2 for bad input, which is told in a sentence."""
    name, *words = [*(sys.argv[1:] if words is None else words)] or ["--help"]
    others = {point.name: point for point in entry_points(group=GROUP)}
    if name in ("-h", "--help"):
        print(_summary(others))
        return 0
    try:
        if name in OWN:
            # a command line's own mistakes are told by tyro, which leaves with 2
            return tyro.cli(OWN[name], args=words, prog=f"patchsae {name}", description=_about(OWN[name]))
        if name in others:
            return others[name].load()(words)
        raise PatchSAEError(f"'{name}' is no command: give one of {', '.join(sorted([*OWN, *others]))}.")
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _about(command: Callable[..., int]) -> str:
    text = (command.__doc__ or "").partition("Parameters\n")[0]
    return " ".join(text.split()) + f" {EXIT}"


def _summary(others: Mapping[str, EntryPoint]) -> str:
    told = {name: (command.__doc__ or "").partition("\n")[0] for name, command in OWN.items()}
    told |= {name: f"(of {point.module}; see its --help)" for name, point in others.items()}
    rows = [f"  {name:8} {told[name]}" for name in sorted(told)]
    return "\n".join(["usage: patchsae COMMAND [options]", "", *rows, "", EXIT])


if __name__ == "__main__":
    sys.exit(main())
