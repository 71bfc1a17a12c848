"""What each process of test_distributed.py does; started by torchrun."""

import sys
from dataclasses import replace
from pathlib import Path

from tiny import CONFIG, tiny_backbone, tiny_images

from patchsae.runs.processes import join
from patchsae.sae.model import SAEConfig
from patchsae.training.trainer import train_sae

# Large steps and a short window, so that latents die; the last chunk's one image leaves the second process
# without tokens. Short, because ghost gradients and Adam enlarge differences of rounding step by step.
SAE_CONFIG = SAEConfig(d_in=32, expansion=4, l1=0.1)
TRAIN = replace(
    CONFIG, images=41, chunk_images=20, token_batch=64, lr=1e-2, dead_window=1,
    b_dec_init="geometric_median_images",
)  # fmt: skip


def train(root: Path, **changes) -> Path:
    """Train this file's SAE, or one that differs by `changes`."""
    config = replace(TRAIN, **changes)
    return train_sae(tiny_images(), tiny_backbone(), SAE_CONFIG, config, root, progress=False).folder


def main(root: Path) -> None:
    whole = train(root / "two")
    resumed = train(root / "resumed")
    assert train(root / "two") == whole  # it is there: nobody waits for anybody
    cached = train(root / "cached", cache=str(root / "shards"))
    processes = join("cpu")
    assert processes.world == 2 and processes.first == (processes.rank == 0)
    if processes.first:
        print(whole, resumed, cached)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
