"""Learn MaPLe's prompts on the base classes of the eleven embedded data sets (`make prompts`).

Sixteen images of each base class, MaPLe's published base-to-novel recipe, but for random crops that keep
half of the image or more: a scene's object is small, and a crop of 8 % seldom shows it. Where a data set
has hundreds of classes, fewer images of each are taken; `manifest.json` says which. Prompts are written in
half precision, beside the table of the run. Stopped at any time, it goes on where it was.

    python artefacts/prompts/train.py --dataset silhouettes --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from patchsae.embedded import DATASETS, embedded_dataset
from patchsae.errors import PatchSAEError
from patchsae.few_shot import few_shot, write_manifest
from patchsae.prompt_files import save_prompts
from patchsae.prompt_training import PromptTrainConfig, train_prompts
from patchsae.prompts import Method
from patchsae.scales import scale
from patchsae.stage import digest, project_root

HERE = Path(__file__).parent
SEEDS = dict.fromkeys(("silhouettes", "sketch_objects", "sketch_activities"), (1, 2, 3))
SHOTS = {"concepts": 2}  # of 261 base classes
HALVES = ("silhouettes", "sketch_activities")  # where MaPLe's two halves are learned alone, too
RECIPE = PromptTrainConfig(crop_scale=(0.5, 1.0))


def learn(
    name: str,
    seed: int,
    work: Path,
    method: Method = Method.MAPLE,
    out: Path = HERE,
    recipe: PromptTrainConfig = RECIPE,
) -> Path:
    """Learn the prompts of a data set with a seed; return the folder they are in."""
    backbone, dataset = scale("embedded").backbone(), embedded_dataset(name)
    shots, folder = SHOTS.get(name, 16), out / method / name / f"seed{seed}"
    drawn = few_shot(dataset, shots, seed).base()
    config = replace(recipe, seed=seed, method=method, template=dataset.template)
    trained = train_prompts(backbone, drawn.train, config, work)
    write_manifest(folder / "manifest.json", dataset, shots, seed)
    shutil.copyfile(trained.folder / "metrics.csv", folder / "metrics.csv")
    source = digest({"images": drawn.train.fingerprint(), "recipe": config.inputs()})
    save_prompts(folder, trained.backbone, drawn.classnames, seed, source, torch.float16)
    return folder


def main() -> int:
    """Learn what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", nargs="*", choices=DATASETS, default=list(DATASETS), help="which; all")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds; by default those of the book")
    parser.add_argument("--work", type=Path, help="folder for checkpoints; by default results")
    parser.add_argument("--method", choices=list(Method), default=Method.MAPLE, help="what is learned")
    given = parser.parse_args()
    method, work = Method(given.method), given.work or project_root() / "results"
    try:
        for name in given.dataset if method is Method.MAPLE else set(HALVES) & set(given.dataset):
            for seed in given.seeds or (SEEDS.get(name, (1,)) if method is Method.MAPLE else (1,)):
                if not (HERE / method / name / f"seed{seed}" / "prompts.json").is_file():
                    print(learn(name, seed, work, method), flush=True)
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
