"""Learn the prompts, and changes of weights, of this folder where they are missing (`make prompts`).

A thin call of `python -m patchbook.train_prompts`: it says which seeds of which sets the book needs. Files
are in half precision; a set's manifest.json tells what it was learned from.

    python artefacts/prompts/train.py --dataset silhouettes --seeds 1 2 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from patchbook.scenes.embedded import DATASETS
from patchbook.train_prompts import main as train_prompts
from patchsae.adaptation.prompts import Method
from patchsae.adaptation.weights import Change

HERE = Path(__file__).parent
SEEDS = dict.fromkeys(("silhouettes", "sketch_objects", "sketch_activities"), (1, 2, 3))
HALVES = ("silhouettes", "sketch_activities")  # where other methods learn, too


def main(arguments: list[str] | None = None) -> int:
    """Learn what is not there yet; return the exit code of the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", nargs="*", choices=DATASETS, default=list(DATASETS), help="which; all")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds; by default those of the book")
    methods = [*Method, *Change]
    parser.add_argument("--method", choices=methods, default=Method.MAPLE, help="what is learned")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for the prompts; by default this one"
    )
    parser.add_argument("--work", type=Path, help="folder for checkpoints; by default results")
    given = parser.parse_args(arguments)
    maple = given.method == Method.MAPLE
    for name in (name for name in given.dataset if maple or name in HALVES):
        seeds = given.seeds or (SEEDS.get(name, (1,)) if maple else (1,))
        options = {
            "--dataset": name,
            "--method": given.method,
            "--prompts": given.out,
            "--work": given.work,
        }
        words = [str(word) for option in options.items() if option[1] is not None for word in option]
        if code := train_prompts([*words, "--half", "--seed", *map(str, seeds)]):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
