"""Learn prompts, or changes of weights, from the command line: `patchsae prompts`, at either scale.

Base classes of a data set, Dassl's draw of a few images per class, MaPLe's published recipe. The result
lies where `find_prompts` looks, `<prompts>/<method>/<dataset>/seed<n>/`, beside the manifest of the images
that it was learned from and the table of its training. What is there is left alone, and a run that was
stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# What learns is imported where it is used: the processes that decode images import this module too.
if TYPE_CHECKING:
    from patchsae.adaptation.prompt_training import PromptTrainConfig
    from patchsae.adaptation.weights import WeightTrainConfig
    from patchsae.clip.backbone import Backbone
    from patchsae.images.sets import Dataset

SHOTS = 16
EMBEDDED_SHOTS = {"concepts": 2}  # of 261 base classes
# a scene's object is small, and a crop of 8 %, as photographs get, seldom shows it
EMBEDDED_CROPS = (0.5, 1.0)
TOKENS, WEIGHTS = ("depth", "n_ctx", "context"), ("rank",)
"""Fields of PromptTrainConfig, and of WeightTrainConfig, that are options of the same name."""
RECIPE = (
    *("epochs", "batch_size", "lr", "momentum", "weight_decay", "warmup_epochs", "warmup_lr"),
    *("augment", "crop_scale", "precision", "workers"),
)
"""Options that both have."""


def learn(
    backbone: Backbone,
    dataset: Dataset,
    config: PromptTrainConfig | WeightTrainConfig,
    prompts: str | Path,
    work: str | Path,
    shots: int = SHOTS,
    half: bool = False,
    progress: bool = True,
) -> Path:
    """Learn prompts, or changes of weights, on base classes; return the folder under `prompts` they are in.

    Parameters
    ----------
    config : its template is replaced by the data set's own
    work : folder for checkpoints
    shots : images of each class
    half : whether the file is in half precision

    Raises
    ------
    PatchSAEError : as `few_shot` and `train_prompts`.
    """
    import torch

    from patchsae.adaptation.prompt_files import prompts_folder, save_prompts
    from patchsae.adaptation.prompt_training import train_prompts
    from patchsae.images.few_shot import few_shot, write_manifest
    from patchsae.runs.stage import digest

    config = replace(config, template=dataset.template)
    folder = prompts_folder(prompts, dataset.name, config.seed, config.method)
    drawn = few_shot(dataset, shots, config.seed).base()
    trained = train_prompts(backbone, drawn.train, config, work, progress)
    write_manifest(folder / "manifest.json", dataset, shots, config.seed)
    shutil.copyfile(trained.folder / "metrics.csv", folder / "metrics.csv")
    source = digest({"images": drawn.train.fingerprint(), "recipe": config.inputs()})
    dtype = torch.float16 if half else torch.float32
    save_prompts(folder, trained.backbone, drawn.classnames, config.seed, source, dtype)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Learn what the arguments ask for and is not there yet, print the folders, return the exit code."""
    options = _parser().parse_args(arguments)
    from patchsae.runs.errors import PatchSAEError

    try:
        _learn_all(options)
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _learn_all(options: argparse.Namespace) -> None:
    from patchbook.scales import scale
    from patchsae.adaptation.prompt_files import CARD, prompts_folder
    from patchsae.adaptation.prompt_training import PromptTrainConfig
    from patchsae.adaptation.prompts import Method
    from patchsae.adaptation.weights import Change, WeightTrainConfig
    from patchsae.runs.errors import PatchSAEError
    from patchsae.runs.stage import project_root

    if options.method not in (methods := (*Method, *Change)):
        raise PatchSAEError(f"--method '{options.method}' is unknown; choose one of {', '.join(methods)}.")
    weights = options.method in list(Change)
    own, others = (WEIGHTS, TOKENS) if weights else (TOKENS, WEIGHTS)
    if wrong := [name for name in others if getattr(options, name) is not None]:
        raise PatchSAEError(
            f"--{wrong[0].replace('_', '-')} means nothing for --method {options.method}: leave it out."
        )
    backbone = scale(options.scale).backbone(
        options.model, options.pretrained, device=options.device, dtype=options.dtype
    )
    embedded = options.scale == "embedded"
    given = {name: getattr(options, name) for name in (*own, *RECIPE) if getattr(options, name) is not None}
    recipe = ({"crop_scale": EMBEDDED_CROPS} if embedded else {}) | given
    configure = (
        partial(WeightTrainConfig.usual, options.method)
        if weights
        else partial(PromptTrainConfig, method=options.method)
    )
    root = project_root()
    prompts = options.prompts or root / ("artefacts/prompts" if embedded else "results/prompts")
    for dataset in _datasets(options, backbone):
        usual = EMBEDDED_SHOTS.get(dataset.name, SHOTS) if embedded else SHOTS
        shots = usual if options.shots is None else options.shots
        for seed in options.seed:
            config = configure(seed=seed, **recipe)
            folder = prompts_folder(prompts, dataset.name, seed, config.method)
            if (folder / CARD).is_file():
                print(f"{folder}: there already; delete it to learn it again", flush=True)
                continue
            args = prompts, options.work or root / "results", shots, options.half, not options.quiet
            print(learn(backbone, dataset, config, *args), flush=True)


def _datasets(options: argparse.Namespace, backbone: Backbone) -> Sequence[Dataset]:
    from patchbook.scenes.embedded import DATASETS, embedded_dataset
    from patchsae.images.benchmark_sets import open_benchmark, open_found
    from patchsae.runs.errors import PatchSAEError

    if options.scale == "embedded":
        return [embedded_dataset(name) for name in options.dataset or DATASETS]
    if not options.data:
        raise PatchSAEError("--scale paper needs --data: the folder that holds one folder per benchmark.")
    if options.dataset:
        return [open_benchmark(name, options.data, backbone.frame) for name in options.dataset]
    found = open_found(options.data, backbone.frame)
    if not found:
        raise PatchSAEError(f"--data: '{options.data}' holds none of the eleven benchmarks; give another.")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchsae prompts",
        description="Learn prompts on the base classes of data sets, where they are not there yet. A run "
        "that was stopped goes on when the same command is given again. What is not given of the recipe is "
        "MaPLe's base-to-novel one, but for crops at the embedded scale.",
        epilog="Exit code: 0 all are there; 2 bad input.",
    )
    add = parser.add_argument
    add("--scale", default="embedded", help="'embedded' (default) or 'paper'")
    add("--data", default="", help="paper scale: folder that holds one folder per benchmark")
    add("--dataset", nargs="+", metavar="NAME", help="data sets (default: all of the scale that are there)")
    add(
        "--method",
        default="maple",
        help="tokens: 'maple' (default), 'coop', 'vpt'; weights: 'lora', 'full'",
    )
    add("--seed", type=int, nargs="+", default=[1], help="one or more seeds (default 1)")
    add("--prompts", type=Path,
        help="folder for the prompts, to be given to the notebooks as the parameter prompts (default: "
        "artefacts/prompts in the project, results/prompts at the paper scale)")  # fmt: skip
    add("--work", type=Path, help="folder for checkpoints (default: results in the project)")
    add("--model", help="another open_clip model name or folder")
    add("--pretrained", help="open_clip tag or weights file of that model")
    add("--device", default="cpu", help="'cpu' (default) or 'cuda'")
    add("--dtype", default="float32", help="of CLIP's weights: 'float32' (default), 'float16', 'bfloat16'")
    add("--shots", type=int, help=f"images of each class (default {SHOTS}, 2 for the set of all concepts)")
    add("--depth", type=int, help="blocks in front of which there are learned tokens (default 9)")
    add("--n-ctx", type=int, help="learned tokens per depth (default 2)")
    add("--rank", type=int, help="lora: rank of the change of each matrix (default 2)")
    add("--context", help="words before the class name (default 'a photo of a')")
    add("--epochs", type=int, help="passes over the images (default 5)")
    add("--batch-size", "--batch", type=int, help="images per step (default 4)")
    add("--lr", type=float, help="step size after warm-up (default: of the method)")
    add("--momentum", type=float, help="momentum of SGD (default 0.9)")
    add("--weight-decay", type=float, help="weight decay of SGD (default 5e-4)")
    add("--warmup-epochs", type=int, help="epochs at the start with the small step size (default 1)")
    add("--warmup-lr", type=float, help="that step size (default 1e-5)")
    add("--augment", action=argparse.BooleanOptionalAction, help="crop and flip at random (default yes)")
    add("--crop-scale", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="shares of an image that a crop shows (default 0.08 1, embedded 0.5 1)")  # fmt: skip
    add("--precision", help="of CLIP's blocks: 'float32' (default), 'bf16' or 'fp16'")
    add("--workers", type=int, help="processes that decode images (default 0)")
    add("--half", action="store_true", help="write the prompts in half precision")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
