"""Run every benchmarks/bench_*.py and write benchmarks/results.json.

A benchmark is a module with `run() -> list[dict]`, each dict one row with the keys of ROW; a ratio
above 1 means ours is better.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import git_commit, versions, write_json

ROW = {
    *("name", "ours", "best_other", "other_name", "unit"),
    *("ratio", "goal", "n", "min", "max"),
}


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "versions": versions(),
        "commit": git_commit(),
        "allocator": os.environ.get("GLIBC_TUNABLES"),
        "date": time.strftime("%Y-%m-%d"),
    }


def collect(folder: Path) -> list[dict[str, Any]]:
    """Run the benchmarks of a folder in the order of their names."""
    rows = []
    for path in sorted(folder.glob("bench_*.py")):
        started = time.perf_counter()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for row in module.run():
            if set(row) != ROW:
                raise PatchSAEError(f"{path} gave a row with other keys than {sorted(ROW)}: {sorted(row)}.")
            print(f"{row['name']}: {row['ratio']:.2f}x of {row['other_name']}", flush=True)
            rows.append(row)
        print(f"{path.name}: {time.perf_counter() - started:.1f} s", flush=True)
    return rows


def main(folder: Path) -> int:
    """Measure everything, then write the file whole."""
    try:
        rows = collect(folder)
        path = write_json(folder / "results.json", {"machine": machine(), "results": rows})
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent))
