"""Float32 products by the library that makes them fastest on this processor.

torch sends float32 products to MKL, which uses AVX2 on processors that are not Intel's, so that half of
an AVX-512 unit lies idle. oneDNN, which torch carries too, uses all of it: on AMD's Zen 5 products are 2.2
times as fast, a tower 1.8 to 2.1 times (`benchmarks/bench_tower.py`). torch asks oneDNN only where float32
may be rounded to bfloat16. oneDNN does that on matrix units (AMX) alone; elsewhere it multiplies float32 as
it is. So it is asked where a product on trial has the error of float32, and nowhere else.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache

import torch

SIDE = 512  # of the product on trial: a matrix unit takes it
WORSE = 4  # times MKL's own error: sums of another order stay within 2, bfloat16 is 1,000 times

_lock, _held = threading.Lock(), []  # what the setting was before the first of several blocks


@contextlib.contextmanager
def fast_float32() -> Iterator[None]:
    """Make float32 products by oneDNN while the block lasts, where these are float32 to the same error.

    Works as a decorator too. Sums have another order, so that results differ in the last bits from those
    outside, and are the same from run to run. torch's setting holds for all threads: the last block that
    ends takes it back, because torch's older functions for it refuse to be mixed with it.
    """
    if not onednn_is_exact():
        yield
        return
    setting = torch.backends.mkldnn.matmul
    with _lock:
        _held.append(setting.fp32_precision)
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            before = _held.pop()  # of the others "bf16", so the first's stays for the last
            setting.fp32_precision = before


@cache
def onednn_is_exact() -> bool:
    """Multiply once both ways and tell whether oneDNN's error is that of float32."""
    # the setting came with torch 2.9
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, SIDE, SIDE, generator=draw)
    exact, setting, error = a.double() @ b.double(), torch.backends.mkldnn.matmul, {}
    with _lock:
        before = setting.fp32_precision
        try:
            for precision in ("ieee", "bf16"):
                setting.fp32_precision = precision
                error[precision] = ((a @ b).double() - exact).norm().item()
        finally:
            setting.fp32_precision = before
    return error["bf16"] <= WORSE * error["ieee"]
