"""The whole of the attacks, at their full numbers, and training for as long as is asked: `make soak`.

    python tests/reliability/soak.py --out benchmarks/soak.json --hours 1

The book's page on reliability is made from what this writes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np  # noqa: E402
from attacks import Tally, checkpoints, failing_disks, images, pickles, power_losses, stages  # noqa: E402
from kills import notebooks, trainings  # noqa: E402

from patchsae.runs.stage import git_commit, machine, write_json  # noqa: E402

MEMORY = Path("/dev/shm")
COUNTS = {images: 5000, checkpoints: 3000, stages: 1000, pickles: 1000}
KILLS = {notebooks: 12, trainings: 4}


def training(hours: float, folder: Path) -> dict[str, float]:
    """Train again and again for some hours; return slopes of memory, open files and throughput."""
    from dataclasses import replace

    import psutil
    from tiny import CONFIG, tiny_backbone, tiny_images

    from patchsae.sae.model import SAEConfig
    from patchsae.training.trainer import train_sae

    process, backbone, pictures = psutil.Process(), tiny_backbone(), tiny_images()
    rows, began, seed = [], time.monotonic(), 0
    while time.monotonic() - began < hours * 3600:
        started = time.monotonic()
        config = replace(CONFIG, seed=seed)
        trained = train_sae(
            pictures, backbone, SAEConfig(d_in=32, expansion=4), config, folder, progress=False
        )
        seconds = time.monotonic() - started
        memory = process.memory_info().rss / 2**20
        rows.append((started - began, memory, process.num_fds(), trained.metrics[-1]["tokens"] / seconds))
        seed += 1
    settled = np.array(rows[len(rows) // 5 :])  # what grows at the start is caches
    if len(settled) < 3:
        return {"hours": hours, "runs": len(rows)}
    at = settled[:, 0] / 3600
    slopes = [float(np.polyfit(at, settled[:, column], 1)[0]) for column in (1, 2, 3)]
    names = ("memory_mb_per_hour", "files_per_hour", "tokens_per_second_per_hour")
    return {
        "hours": round((time.monotonic() - began) / 3600, 3),
        "runs": len(rows),
        "memory_mb": float(settled[:, 1].mean()),
        "tokens_per_second": float(settled[:, 3].mean()),
        **dict(zip(names, slopes, strict=True)),
    }


def main() -> int:
    """Attack, train, write what came of it; return 1 if anything was lost or believed wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/soak.json"), help="where the result goes"
    )
    parser.add_argument("--hours", type=float, default=0.0, help="hours of training (default: none)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the numbers of attacks (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn")
    options, rows, began = parser.parse_args(), [], time.monotonic()

    def keep(attack, *arguments: object) -> None:
        started = time.monotonic()
        # in memory: what is tried is the order of operations, not the speed of a disk
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            tally: Tally = attack(*arguments, Path(folder))
        row = {"attack": attack.__name__, "about": attack.__doc__.split("\n")[0], **tally}
        rows.append(row | {"seconds": round(time.monotonic() - started, 1), "examples": tally.examples})
        print(rows[-1], flush=True)
        write({})  # what is done is kept when the rest is stopped

    def write(trained: dict[str, float]) -> None:
        seconds = round(time.monotonic() - began, 1)
        write_json(options.out, facts | {"seconds": seconds, "attacks": rows, "training": trained})

    command = " ".join(["python tests/reliability/soak.py", *sys.argv[1:]])
    facts = {"command": command, "commit": git_commit(), "machine": machine(), "seed": options.seed}
    warnings.simplefilter("ignore", UserWarning)  # Pillow has one for every other damaged picture
    os.environ["PATCHSAE_CACHE"] = tempfile.mkdtemp()
    for attack, count in COUNTS.items():
        keep(attack, max(1, round(count * options.share)), options.seed)
    for attack in (failing_disks, power_losses):
        keep(attack)
    for attack, count in KILLS.items():
        keep(attack, max(1, round(count * options.share)), options.seed)
    with tempfile.TemporaryDirectory() as folder:
        trained = training(options.hours, Path(folder)) if options.hours else {}
    write(trained)
    return int(any(row["garbage"] or row["traceback"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
