"""From a folder of pictures to a page to click in: `python -m patchsae.explorer`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from patchsae.clip.backbone import Backbone, load_backbone
from patchsae.clip.files import find_clip
from patchsae.explorer.widget import page_path
from patchsae.images.sets import ImageSet

# the short way is built on the rooms, and this command on the short way
from patchsae.lens import RESULTS, Lens, explore, load_sae, open_images, train
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAEConfig

EXPANSION = 16
TRAINING = ("expansion", "activation", "k", "l1", "seen", "token_batch", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        out = page_path(options.out)  # before an hour of training
        clip = _clip(options)
        pictures = open_images(options.images, clip)
        lens = _lens(options, clip, pictures)
        shown = not options.quiet
        explorer = explore(lens, pictures, options.results, options.gallery, shown, options.classes)
        explorer.save(out)
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{lens.sae.d_sae:,} latents on {len(pictures):,} pictures: open {out.resolve().as_uri()}")
    return 0


def _clip(options: argparse.Namespace) -> Backbone:
    source = find_clip(options.model, options.pretrained)
    if source.tag is None and source.weights is None:
        raise PatchSAEError(
            f"--model {options.model} alone has random weights: give --pretrained, a tag such as 'openai' "
            f"or a file."
        )
    return load_backbone(options.model, options.pretrained, block=options.block, device=options.device)


def _lens(options: argparse.Namespace, clip: Backbone, pictures: ImageSet) -> Lens:
    given = {name: getattr(options, name) for name in TRAINING if getattr(options, name) is not None}
    if options.sae is None:
        fields = {"expansion": EXPANSION} | given
        if "seen" in fields:
            fields["images"] = fields.pop("seen")
        return train(clip, pictures, options.results, progress=not options.quiet, **fields)
    if given:
        name = next(iter(given)).replace("_", "-")
        raise PatchSAEError(
            f"--{name} is for training, but --sae gives a trained autoencoder: leave out one of the two."
        )
    return load_sae(options.sae, clip)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m patchsae.explorer",
        description="Write a page on which the latents of an autoencoder can be looked at on your "
        "pictures. Without --sae one is trained on them first. What was computed before is read again.",
        epilog="Exit code: 0 done; 2 bad input. What the page loads lies beside it, in a folder whose name "
        "ends in _files: move both together.",
    )
    add, training = parser.add_argument, parser.add_argument_group("training, without --sae").add_argument
    add("--images", type=Path, required=True, help="folder of pictures, or of folders that are classes")
    add("--model", required=True, help="open_clip model name, or a folder that holds one")
    add("--pretrained", help="open_clip tag or weights file of a model given by name")
    add("--block", type=int, required=True, help="block whose output is decomposed, from 1")
    add("--sae", help="folder or file of a trained autoencoder, or hf:organisation/name")
    add("--gallery", type=int, default=12, help="pictures to choose from on the page (default: 12)")
    add("--classes", nargs="+", default=(), metavar="NAME", help="names to choose from, not the folders")
    add("--out", type=Path, default=Path("explorer.html"), help="the page (default: explorer.html)")
    add("--results", type=Path, default=Path(RESULTS), help=f"what is computed (default: {RESULTS})")
    add("--device", default="cpu", help="'cpu' (default) or 'cuda'")
    add("--quiet", action="store_true", help="no progress bars")
    training("--expansion", type=float, help=f"latents per dimension (default: {EXPANSION})")
    training("--activation", help="'relu' (default), 'topk' or 'batchtopk'")
    training("--k", type=int, help="active latents per token, for topk and batchtopk")
    training("--l1", type=float, help=f"weight of the L1 penalty (default: {SAEConfig.l1:g})")
    training("--seen", type=int, help="pictures seen, counted with repetition (default: each once)")
    training("--token-batch", type=int, help="tokens per step")
    training("--seed", type=int, help="seed of weights and order (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
