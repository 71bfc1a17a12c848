"""Throughput of two data-parallel processes against one, on the same cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from measure import Row, row

from patchsae.runs.errors import PatchSAEError

SCRIPT = Path(__file__).with_name("rank_steps.py")
SIZES = [(128, 2_048, 8_192), (768, 12_288, 4_096)]
ROUNDS = 3


def run() -> list[Row]:
    """Measure one and two processes in turn; two share the cores that one has for itself."""
    return [compare(*size) for size in SIZES]


def compare(d_in: int, d_sae: int, tokens: int) -> Row:
    """Return one row: tokens per second of two processes against one."""
    rounds = [(_speed(1, d_in, d_sae, tokens), _speed(2, d_in, d_sae, tokens)) for _ in range(ROUNDS)]
    one, two = (median(values) for values in zip(*rounds, strict=True))
    ratios = [b / a for a, b in rounds]
    name = f"data parallel, 2 processes, {d_sae:,} latents, {tokens:,} tokens a step"
    return row(name, two, one, "1 process on the same cores", "tokens/s", ratios, None)


def _speed(processes: int, *size: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT), *map(str, size)]
    # torchrun would give every process one thread; the script divides the cores itself
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise PatchSAEError(f"{SCRIPT.name} failed with {processes} processes: {done.stderr[-400:]}")
    return float(done.stdout.split()[-1])
