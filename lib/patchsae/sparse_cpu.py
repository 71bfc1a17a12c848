"""The sparse step on the processor: only active entries are touched once the encoder product is taken.

Two list orders are used. *Latent-major*: for every latent the tokens it is active on, `start [d_sae+1]`,
`token [nnz]` ascending, `value [nnz]`. *Token-major*: for every token its latents, likewise. A pool of
threads runs the kernels on ranges of rows. No result depends on which thread had which range, so a step
gives the same bits in every run on one machine.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import sparse_kernels as kernels
from .sparse_kernels import BETA1, BETA2

BLOCK = 512  # latents per encoder product: rows, product and lists stay in the second-level cache
ROWS = 256  # latents or tokens per range in the other kernels


class Lists(NamedTuple):
    """Active entries grouped by row."""

    start: np.ndarray  # [rows + 1] int64
    index: np.ndarray  # [nnz] int32: token if latent-major, latent if token-major
    value: np.ndarray  # [nnz] float32


class Adam(NamedTuple):
    """One parameter with its moments, as arrays that share the tensors' memory."""

    p: np.ndarray
    m: np.ndarray
    v: np.ndarray


@cache
def has_bf16_units() -> bool:
    """Tell whether the processor multiplies bf16 matrices in hardware."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return " amx_bf16" in file.read()
    except OSError:
        return False


_scratch = threading.local()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # one torch thread in each: OpenMP's own threads would go on spinning beside ours
    return ThreadPoolExecutor(threads, "sparse", initializer=torch.set_num_threads, initargs=(1,))


def spread(task: Callable, ranges: Iterable[tuple[int, int]]) -> list:
    """Run task(start, stop) for every range on as many threads as torch uses, results in order."""
    return list(_pool(torch.get_num_threads()).map(lambda r: task(*r), ranges))


def ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Cut 0 … total into ranges of `size`."""
    return [(a, min(a + size, total)) for a in range(0, total, size)]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return this thread's scratch tensor of that name, made again only when the shape changes."""
    held = getattr(_scratch, name, None)
    if held is None or held.shape != shape:
        held = torch.zeros(shape, dtype=dtype)
        setattr(_scratch, name, held)
    return held


def active(
    x: np.ndarray, W_enc: np.ndarray, b_enc: np.ndarray, b_dec: np.ndarray, bf16: bool
) -> tuple[Lists, np.ndarray, float]:
    """Find every z = W_enc (x - b_dec) + b_enc > 0 without holding [tokens, latents].

    With `bf16` the product is taken in bf16 with four more columns, which add b_enc and an upper bound of
    what rounding may have taken away (‖x - x_hi‖‖w‖ + ‖x_hi‖‖w - w_hi‖ and the accumulation's error), so
    that its sign misses no active entry; those it names are computed again in float32.

    x [N, d], W_enc [d_sae, d], b_enc [d_sae], b_dec [d], all float32. Returns latent-major lists,
    x - b_dec, and the seconds that the product alone took.
    """
    n, d = x.shape
    width = -(-(d + 4) // 32) * 32 if bf16 else 0
    slack = np.float32(2.0**-22 * (d + 4))  # float32 sums of d + 4 terms, twice over
    centred = np.empty_like(x)
    padded = -(-n // 4) * 4
    tokens = torch.zeros(padded, width, dtype=torch.bfloat16)
    halves = tokens.view(torch.uint16).numpy()
    spread(lambda a, b: kernels.augment_tokens(x, b_dec, slack, centred, halves, a, b), ranges(n, ROWS))
    count = np.zeros(len(W_enc), np.int64)
    transposed = torch.from_numpy(centred).T

    def block(a: int, b: int) -> tuple[np.ndarray, np.ndarray, float]:
        token = buffer("token", (BLOCK * padded + 1,), torch.int32).numpy()
        value = buffer("value", (BLOCK * padded + 1,), torch.float32).numpy()
        if bf16:
            rows = buffer("rows", (b - a, width), torch.bfloat16)
            kernels.augment_latents(W_enc, b_enc, slack, rows.view(torch.uint16).numpy(), a, b)
            product = buffer("halves", (b - a, padded), torch.bfloat16)
            started = time.perf_counter()
            torch.mm(rows, tokens.T, out=product)
            seconds = time.perf_counter() - started
            words = product.view(torch.int64).numpy().view(np.uint64)
            size = kernels.survivors(words, W_enc, b_enc, centred, count, token, value, a, b)
        else:
            product = buffer("product", (b - a, n), torch.float32)
            started = time.perf_counter()
            torch.mm(torch.from_numpy(W_enc[a:b]), transposed, out=product)
            seconds = time.perf_counter() - started
            size = kernels.compress(product.numpy(), b_enc, count, token, value, a, b)
        return token[:size].copy(), value[:size].copy(), seconds

    token, value, seconds = zip(*spread(block, ranges(len(W_enc), BLOCK)), strict=True)
    start = np.concatenate([[0], np.cumsum(count)])
    lists = Lists(start, np.concatenate(token), np.concatenate(value))
    return lists, centred, sum(seconds) / torch.get_num_threads()


def by_token(lists: Lists, n: int) -> Lists:
    """Turn latent-major lists into token-major ones for n tokens."""
    return Lists(*kernels.by_token(*lists, n))


def decode(lists: Lists, W_dec: np.ndarray, b_dec: np.ndarray) -> np.ndarray:
    """Compute x̂ [N, d] from token-major lists."""
    out = np.empty((len(lists.start) - 1, W_dec.shape[1]), np.float32)
    spread(lambda a, b: kernels.decode(*lists, W_dec, b_dec, out, a, b), ranges(len(out), ROWS))
    return out


def slopes(
    x: np.ndarray, x_hat: np.ndarray, weight: np.ndarray, over_norm: bool
) -> tuple[float, np.ndarray]:
    """Compute the reconstruction term and its gradient [N, d] with respect to x̂.

    `weight` [N] multiplies the tokens' errors (empty: all 1); `over_norm` is Loss.MSE_OVER_NORM.
    """
    loss, slope = np.empty(len(x), np.float32), np.empty_like(x)
    spread(
        lambda a, b: kernels.slopes(x, x_hat, weight, over_norm, loss, slope, a, b), ranges(len(x), ROWS)
    )
    return float(loss.mean(dtype=np.float64)), slope


class Ghost(NamedTuple):
    """Ghost gradients of the dead latents."""

    index: np.ndarray  # [d_sae] int32: row below, or -1; empty if there are none
    enc: np.ndarray  # [dead, d]
    bias: np.ndarray  # [dead]
    dec: np.ndarray  # [dead, d]


def no_ghost(d: int) -> Ghost:
    """Return the value that stands for 'no ghost gradients'."""
    empty = np.empty((0, d), np.float32)
    return Ghost(np.empty(0, np.int32), empty, np.empty(0, np.float32), empty)


class Slopes(NamedTuple):
    """What the gradients are made of."""

    lists: Lists  # latent-major
    tokens: np.ndarray  # [N, d] what the encoder saw, x - b_dec
    slope: np.ndarray  # [N, d] gradient with respect to x̂
    penalty: float  # λ / N
    ghost: Ghost


def gradients(slopes: Slopes, W_dec: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the dense gradients of W_enc, b_enc and W_dec (component along the rows included)."""
    enc, dec, bias = np.empty_like(W_dec), np.empty_like(W_dec), np.empty(len(W_dec), np.float32)
    lists, x, g, penalty, ghost = slopes
    args = lists, x, g, np.float32(penalty), W_dec, ghost, enc, bias, dec
    spread(lambda a, b: kernels.gradients(*args, a, b), ranges(len(W_dec), ROWS))
    return enc, bias, dec


def update(slopes: Slopes, enc: Adam, bias: Adam, dec: Adam, lr: float, step: int) -> np.ndarray:
    """Take Adam step number `step` on every latent and renormalise its decoder row, in place.

    Dense gradients are never held: each latent's is made, used and dropped. Returns
    Σ_i (∂L/∂b_enc)_i W_enc_i [d], what b_dec receives through the encoder, with its sign turned.
    """
    parts = ranges(len(dec.p), ROWS)
    pull = np.zeros((len(parts), dec.p.shape[1]), np.float32)
    lists, x, g, penalty, ghost = slopes
    args = lists, x, g, np.float32(penalty), enc, bias, dec, ghost, *adam_scalars(lr, step)
    spread(lambda a, b: kernels.update(*args, pull[a // ROWS], a, b), parts)
    return pull.sum(0)


def adam_scalars(lr: float, step: int) -> tuple[np.float32, np.float32]:
    """Return lr / (1 - β1^t) and 1 / √(1 - β2^t)."""
    return np.float32(lr / (1 - BETA1**step)), np.float32(1 / math.sqrt(1 - BETA2**step))


def adam_row(row: Adam, g: np.ndarray, lr: float, step: int) -> None:
    """Take Adam step number `step` on one vector, in place."""
    kernels.adam(*row, g, *adam_scalars(lr, step))


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's memory as an array."""
    return tensor.detach().numpy()
