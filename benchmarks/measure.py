"""What the benchmarks share: a row of results.json, progress, and resident memory."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

from patchsae.runs.errors import PatchSAEError

Row = dict[str, Any]


def row(
    name: str,
    own: float,
    other: float,
    other_name: str,
    unit: str,
    ratios: list[float],
    goal: float | None,
    ratio: float | None = None,
) -> Row:
    """Return one row of results.json; `ratios` are the rounds', `ratio` is own / other if omitted."""
    return {
        **{"name": name, "ours": own, "best_other": other, "other_name": other_name, "unit": unit},
        **{"ratio": own / other if ratio is None else ratio, "goal": goal},
        **{"n": len(ratios), "min": min(ratios), "max": max(ratios)},
    }


def with_matrix_units(goal: float | None) -> float | None:
    """Return a goal of bf16 candidates, or None where the processor lacks the units it is stated for.

    AVX-512's dot products make bf16 faster too, but not by what AMX's tiles do.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    return goal if "amx_bf16" in flags else None


def say(text: str) -> None:
    """Show progress at once, also through a pipe."""
    print(text, flush=True)


def forget_peak() -> float:
    """Give freed memory back, forget the high-water mark, and return what is resident: in MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what comes next would move into pages that are resident but free
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return before


def resident(key: str) -> float:
    """Return VmRSS or VmHWM of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise PatchSAEError(f"/proc/self/status has no {key}; memory is measured on Linux only.")
