"""Tokens rebuilt from nested sets of latents, all sets in one reading of the active latents.

A ranking of latents and sizes k_1 < k_2 < … cut the latents into buckets: those ranked up to k_1, those up
to k_2, … and the rest. With B_i the sum of f_s W_dec[s] over bucket i, the first k_j latents write
B_1 + … + B_j and the others what is left: each active latent is added once for all sizes, on and off.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from patchsae.sae.cpu import Lists, array
from patchsae.sae.cpu_kernels import kernel, prefetch
from patchsae.sae.model import SAE

RELEASED_BIAS = 0.105131256516992  # minus the released code's -0.105…, on every coordinate (facts.md §4.8)
SWITCHES = ("on", "off")


class Mode(StrEnum):
    """What stands in for a token x when only the latents m are on (facts.md §4.8)."""

    REPLACE = "replace"  # x̂_m, what these latents rebuild
    REPLACE_BIAS = "replace_bias"  # x̂_m plus the released code's scalar
    ADD_ERROR = "add_error"  # x̂_m + (x - x̂): paper, footnote 4; Templeton (2024)


def bucket_tables(order: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return each latent's bucket, uint8 [R, S], for rankings `order` [R, S] and ascending sizes."""
    rank = np.empty(order.shape, np.int64)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    return np.searchsorted(np.asarray(sizes), rank, side="right").astype(np.uint8)


def masked_tokens(sae: SAE, x: Tensor, lists: Lists, tables: np.ndarray, sizes: int, mode: Mode) -> Tensor:
    """Rebuild tokens x [T, d_in] under nested masks: float32 [G, 2, sizes, T, d_in], on then off.

    On, the latents of the first buckets write alone; off, all others do. With every latent on, ADD_ERROR
    returns x to the last bit, because what is off is taken away from x.

    Parameters
    ----------
    lists : token-major lists of the latents that are active on x
    tables : uint8 [G, S], each latent's bucket in G rankings, 0 … sizes
    """
    _, mean, scale = sae.normalise(x)
    start, latent, value = lists
    if isinstance(scale, Tensor):
        value = value * np.repeat(scale[:, 0].cpu().numpy(), np.diff(start)).astype(np.float32)
    taken = mode is Mode.ADD_ERROR
    base = x if taken else (sae.b_dec * scale + mean).expand_as(x)
    if mode is Mode.REPLACE_BIAS:
        base = base + RELEASED_BIAS
    if x.device.type != "cpu":
        return _nest(sae.W_dec, base, Lists(start, latent, value), tables, sizes, taken)
    out = torch.empty(len(tables), 2, sizes, *x.shape)
    nest(start, latent, value, array(sae.W_dec), tables, array(base.contiguous()), taken, array(out))
    return out


@kernel
def nest(start, latent, value, W_dec, tables, base, taken, out):
    """Write out [G, 2, n, T, d]: `base` plus what is on, or, if `taken`, minus what is off."""
    groups, _, sizes, tokens, d = out.shape
    sums = np.empty((groups, sizes + 1, d), np.float32)
    upwards, sign = (1, np.float32(-1)) if taken else (0, np.float32(1))
    for t in range(tokens):
        sums[:] = 0
        for e in range(start[t], start[t + 1]):
            if e + 1 < start[t + 1]:
                prefetch(W_dec, latent[e + 1])
            f, row = sign * value[e], W_dec[latent[e]]
            for g in range(groups):
                into = sums[g, tables[g, latent[e]]]
                for k in range(d):
                    into[k] += f * row[k]
        for g in range(groups):
            up, down = out[g, upwards], out[g, 1 - upwards]
            for j in range(sizes):  # the first buckets, more and more of them
                before = base[t] if j == 0 else up[j - 1, t]
                for k in range(d):
                    up[j, t, k] = before[k] + sums[g, j, k]
            for j in range(sizes - 1, -1, -1):  # the last buckets
                before = base[t] if j == sizes - 1 else down[j + 1, t]
                for k in range(d):
                    down[j, t, k] = before[k] + sums[g, j + 1, k]


def _nest(W_dec: Tensor, base: Tensor, lists: Lists, tables: np.ndarray, sizes: int, taken: bool) -> Tensor:
    """Do what `nest` does, in torch, on the device of W_dec."""
    start, latent, value = (torch.from_numpy(part).to(W_dec.device) for part in lists)
    tokens, d = base.shape
    rows = value[:, None] * W_dec[latent.long()] * (-1 if taken else 1)  # [nnz, d]
    token = torch.repeat_interleave(torch.arange(tokens, device=W_dec.device), start.diff())
    out = base.new_empty(len(tables), 2, sizes, tokens, d)
    for g, table in enumerate(torch.from_numpy(tables).to(W_dec.device)):
        place = table[latent.long()].long() * tokens + token
        sums = base.new_zeros((sizes + 1) * tokens, d).index_add_(0, place, rows).view(-1, tokens, d)
        out[g, int(taken)] = base + sums[:-1].cumsum(0)
        out[g, 1 - int(taken)] = base + sums[1:].flip(0).cumsum(0).flip(0)
    return out
