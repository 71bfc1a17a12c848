"""The sparse step on the processor: only active entries are touched once the encoder product is taken.

Two list orders are used. *Latent-major*: for every latent the tokens it is active on, `start [d_sae+1]`,
`token [nnz]` ascending, `value [nnz]`. *Token-major*: for every token its latents, likewise. A pool of
threads runs the kernels on ranges of rows. No result depends on which thread had which range, so a step
gives the same bits in every run on one machine.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchsae.runs.threads import ranges, spread
from patchsae.sae import cpu_kernels as kernels
from patchsae.sae.ghost import GhostRows, Pass
from patchsae.sae.model import SAE, Activation, Loss

Moments = Mapping[str, tuple[Tensor, Tensor]]

BLOCK = 512  # latents per encoder product: rows, product and lists stay in the second-level cache
LEAST_BLOCK = 64  # where many threads have to share the memory of a few
ROWS = 256  # latents or tokens per range in the other kernels


class Lists(NamedTuple):
    """Active entries grouped by row."""

    start: np.ndarray  # [rows + 1] int64
    index: np.ndarray  # [nnz] int32: token if latent-major, latent if token-major
    value: np.ndarray  # [nnz] float32


@cache
def has_bf16_units() -> bool:
    """Tell whether the processor multiplies bf16 in hardware: AMX tiles, or AVX-512's dot products."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return not {"amx_bf16", "avx512_bf16"}.isdisjoint(file.read().split())
    except OSError:
        return False


_scratch = threading.local()


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return this thread's scratch tensor of that name, made again only when the shape changes."""
    held = getattr(_scratch, name, None)
    if held is None or held.shape != shape:
        held = torch.zeros(shape, dtype=dtype)
        setattr(_scratch, name, held)
    return held


def block_size(threads: int) -> int:
    """Return the latents per encoder product: with more threads fewer, so that buffers sum to the same."""
    return min(BLOCK, max(LEAST_BLOCK, 2 * BLOCK // threads))


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

    size = block_size(torch.get_num_threads())

    def block(a: int, b: int) -> tuple[np.ndarray, np.ndarray, float]:
        token = buffer("token", (size * padded + 1,), torch.int32).numpy()
        value = buffer("value", (size * padded + 1,), torch.float32).numpy()
        if bf16:
            rows = buffer("rows", (b - a, width), torch.bfloat16)
            kernels.augment_latents(W_enc, b_enc, slack, rows.view(torch.uint16).numpy(), a, b)
            product = buffer("halves", (b - a, padded), torch.bfloat16)
            started = time.perf_counter()
            torch.mm(rows, tokens.T, out=product)
            seconds = time.perf_counter() - started
            words = product.view(torch.int64).numpy().view(np.uint64)
            found = kernels.survivors(words, W_enc, b_enc, centred, count, token, value, a, b)
        else:
            product = buffer("product", (b - a, n), torch.float32)
            started = time.perf_counter()
            torch.mm(torch.from_numpy(W_enc[a:b]), transposed, out=product)
            seconds = time.perf_counter() - started
            found = kernels.compress(product.numpy(), b_enc, count, token, value, a, b)
        return token[:found].copy(), value[:found].copy(), seconds

    token, value, seconds = zip(*spread(block, ranges(len(W_enc), size)), strict=True)
    start = np.concatenate([[0], np.cumsum(count)])
    lists = Lists(start, np.concatenate(token), np.concatenate(value))
    return lists, centred, sum(seconds) / torch.get_num_threads()


def strongest(
    x: np.ndarray, W_enc: np.ndarray, b_enc: np.ndarray, b_dec: np.ndarray, k: int
) -> tuple[Lists, np.ndarray, float]:
    """Find each token's k largest z = W_enc (x - b_dec) + b_enc that are above 0; returns as `active`."""
    n, d_sae = len(x), len(W_enc)
    centred = x - b_dec
    weights, bias = torch.from_numpy(W_enc).T, torch.from_numpy(b_enc)
    count, latent = np.empty(n, np.int64), np.empty((n, k), np.int32)
    value = np.empty((n, k), np.float32)

    def block(a: int, b: int) -> float:
        product = buffer("strongest", (b - a, d_sae), torch.float32)
        started = time.perf_counter()
        torch.addmm(bias, torch.from_numpy(centred[a:b]), weights, out=product)
        seconds = time.perf_counter() - started
        kernels.strongest(product.numpy(), k, count, latent, value, a, b)
        return seconds

    seconds = sum(spread(block, ranges(n, ROWS))) / torch.get_num_threads()
    kept = np.arange(k) < count[:, None]
    start = np.concatenate([[0], np.cumsum(count)])
    # the transposition is the same in both directions
    return Lists(*kernels.by_token(start, latent[kept], value[kept], d_sae)), centred, seconds


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


class Slopes(NamedTuple):
    """What the gradients are made of."""

    lists: Lists  # latent-major
    tokens: np.ndarray  # [N, d] what the encoder saw, x - b_dec
    slope: np.ndarray  # [N, d] gradient with respect to x̂


def forward(
    sae: SAE, x: Tensor, weight: Tensor | None, bf16: bool, count: Callable[[str, float], None]
) -> Pass:
    """Encode and decode tokens x [N, d]; `weight` [N] multiplies their errors, `count` takes seconds."""
    started = time.perf_counter()
    tokens, (W_enc, b_enc, W_dec, b_dec) = x.numpy(), arrays(sae)
    shift = b_dec if sae.config.subtract_b_dec else np.zeros_like(b_dec)
    if sae.config.activation is Activation.TOPK:
        lists, centred, product = strongest(tokens, W_enc, b_enc, shift, sae.config.k)
    else:
        lists, centred, product = active(tokens, W_enc, b_enc, shift, bf16 and has_bf16_units())
    found = time.perf_counter()
    count("encoder", product)
    count("candidates", found - started - product)
    x_hat = decode(by_token(lists, len(x)), W_dec, b_dec)
    weights = np.empty(0, np.float32) if weight is None else array(weight)
    loss, slope = slopes(tokens, x_hat, weights, sae.config.loss is Loss.MSE_OVER_NORM)
    count("decode", time.perf_counter() - found)
    total = float(lists.value.sum(dtype=np.float64))
    fired = torch.from_numpy(np.diff(lists.start) > 0)
    left = Slopes(lists, centred, slope)
    return Pass(loss, len(lists.value), total, fired, torch.from_numpy(x_hat), left)


def forward_lists(sae: SAE, x: Tensor, bf16: bool) -> Lists:
    """Encode tokens x [N, d] into latent-major lists."""
    W_enc, b_enc, _, b_dec = arrays(sae)
    shift = b_dec if sae.config.subtract_b_dec else np.zeros_like(b_dec)
    return active(x.numpy(), W_enc, b_enc, shift, bf16 and has_bf16_units())[0]


def gradients(sae: SAE, done: Pass, ghost: GhostRows | None) -> dict[str, Tensor]:
    """Compute the dense gradient of every parameter (W_dec's component along its rows included)."""
    lists, x, g = done.slopes
    W_enc, _, W_dec, _ = arrays(sae)
    enc, dec, bias = np.empty_like(W_dec), np.empty_like(W_dec), np.empty(len(W_dec), np.float32)
    penalty = np.float32(sae.l1 / len(x))
    # a NamedTuple would enter numba's cache on disk by its class, which may be gone in the next version
    args = tuple(lists), x, g, penalty, W_dec, indexed(ghost, sae), enc, bias, dec
    spread(lambda a, b: kernels.gradients(*args, a, b), ranges(len(W_dec), ROWS))
    back = bias @ W_enc if sae.config.subtract_b_dec else 0
    found = {"W_enc": enc, "b_enc": bias, "W_dec": dec, "b_dec": g.sum(0) - back}
    return {name: torch.from_numpy(value) for name, value in found.items()}


def update(sae: SAE, done: Pass, ghost: GhostRows | None, moments: Moments, lr: float, step: int) -> Tensor:
    """Take Adam step number `step` on every latent and renormalise its decoder row, in place.

    Dense gradients are never held: each latent's is made, used and dropped. `moments` holds every
    parameter's exp_avg and exp_avg_sq. Returns the gradient of b_dec, whose step is the caller's.
    """
    lists, x, g = done.slopes
    parts = ranges(sae.d_sae, ROWS)
    pull = np.zeros((len(parts), sae.d_in), np.float32)
    adams = [
        (array(getattr(sae, name)), *(array(moment) for moment in moments[name]))
        for name in ("W_enc", "b_enc", "W_dec")
    ]
    rate = np.float32(lr / (1 - kernels.BETA1**step))
    root = np.float32(1 / math.sqrt(1 - kernels.BETA2**step))
    penalty = np.float32(sae.l1 / len(x))
    args = tuple(lists), x, g, penalty, *adams, indexed(ghost, sae), rate, root
    spread(lambda a, b: kernels.update(*args, pull[a // ROWS], a, b), parts)
    return torch.from_numpy(g.sum(0) - (pull.sum(0) if sae.config.subtract_b_dec else 0))


def indexed(ghost: GhostRows | None, sae: SAE) -> tuple[np.ndarray, ...]:
    """Return ghost rows as arrays, the first giving each latent's row or -1 (empty if there are none)."""
    if ghost is None:
        empty = np.empty((0, sae.d_in), np.float32)
        return np.empty(0, np.int32), empty, np.empty(0, np.float32), empty
    index = np.full(sae.d_sae, -1, np.int32)
    index[array(ghost.latents)] = np.arange(len(ghost.latents))
    return index, *(array(rows) for rows in ghost[1:])


def arrays(sae: SAE) -> tuple[np.ndarray, ...]:
    """Return W_enc, b_enc, W_dec and b_dec as arrays that share their memory."""
    return tuple(array(p) for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))


def array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's memory as an array."""
    return tensor.detach().numpy()
