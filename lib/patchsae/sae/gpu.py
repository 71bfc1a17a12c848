"""The exact sparse ReLU step on a CUDA device: Triton kernels and the functions that launch them.

Importing this module needs Triton, which comes with torch's CUDA build; without it ImportError is raised.

No array of [tokens, latents] numbers exists: the encoder product leaves one bit per pair, the bits become
lists of (token, value) for each latent, and everything after works on the lists. No result depends on
timing: every sum has one order, and nothing is added to memory that another program adds to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from patchsae.runs.errors import PatchSAEError
from patchsae.sae.ghost import GhostRows, Pass
from patchsae.sae.gpu_kernels import (
    count_kernel,
    decode_kernel,
    dot_kernel,
    expand_kernel,
    mask_kernel,
    round_kernel,
    split_kernel,
    update_kernel,
)
from patchsae.sae.model import SAE, Loss

CAP = 256  # most entries for one program: one frequent latent would hold up all others
GROUP = 4  # latents per program of the update; each group leaves one partial sum of b_dec's gradient
# Tensor cores align 8 or more products and the running sum to the largest and truncate to 24 bits or more:
# at most 9/8 · 2^-23 of Σ|w x| for each product. The rest covers the product that tf32x3 leaves out.
ACCUMULATION = 2.0**-22


class Active(NamedTuple):
    """The positive pre-activations by latent: those of latent i are entries start[i] to start[i + 1]."""

    start: Tensor  # [m + 1] int64
    token: Tensor  # [entries] int32, ascending inside a latent
    value: Tensor  # [entries] float32, > 0


class Decoded(NamedTuple):
    """Reconstruction, its gradient and the error of each token."""

    x_hat: Tensor  # [N, d]
    g: Tensor  # [N, d], derivative of the reconstruction term with respect to x_hat
    error: Tensor  # [N], weighted; its mean is the reconstruction term


def active_set(
    xc: Tensor, W_enc: Tensor, b_enc: Tensor, bf16: bool, most: int | None = None
) -> Active | None:
    """Find all positive pre-activations z = W_enc xc + b_enc without forming z.

    A matrix product finds every pair whose z can be positive given how far the product can be off (the
    bound of `_possible`); their z are then computed in float32 and those above 0 kept. The result is the
    same, to the bit, whichever product is used. Waits twice for the device, for the lists' lengths.

    Parameters
    ----------
    xc : float32 [N, d], tokens minus b_dec
    W_enc : float32 [m, d]
    b_enc : float32 [m]
    bf16 : product in bfloat16 (fast) instead of three TF32 products
    most : give up, with None, when more pairs than this can be positive

    Raises
    ------
    PatchSAEError : a tensor has another shape or type, or is not contiguous.
    """
    (tokens, width), latents = xc.shape, len(W_enc)
    _check(("xc", xc, (tokens, width)), ("W_enc", W_enc, (latents, width)), ("b_enc", b_enc, (latents,)))
    if not tokens:
        nothing = torch.zeros(latents + 1, dtype=torch.int64, device=xc.device)
        return Active(nothing, nothing[:0].int(), nothing[:0].float())
    with torch.cuda.device_of(xc):
        words = _possible(xc, W_enc, b_enc, bf16)
        shape = {"ROWS": 16, "BLOCK": min(128, triton.next_power_of_2(words.shape[1])), "num_warps": 4}
        grid = (triton.cdiv(latents, 16),)
        count = torch.empty(latents, dtype=torch.int32, device=xc.device)
        count_kernel[grid](words, count, *words.shape, **shape)
        start = _offsets(count)
        size = int(start[-1])
        if most is not None and size > most:
            return None
        token = torch.empty(size, dtype=torch.int32, device=xc.device)
        expand_kernel[grid](words, start, token, *words.shape, **shape)
        del words
        value = torch.empty(size, dtype=torch.float32, device=xc.device)
        block = min(256, triton.next_power_of_2(width))
        dot_kernel[(triton.cdiv(size, 16),)](
            W_enc, _owners(start, size), xc, token, b_enc, value, size,
            D=width, BLOCK_E=16, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
        kept = value > 0
        index = kept.nonzero().squeeze(1)
        return Active(_offsets(kept)[start], token[index], value[index])


def _possible(xc: Tensor, W_enc: Tensor, b_enc: Tensor, bf16: bool) -> Tensor:
    """Mark the pairs whose z may be positive, int32 [m, words]: bit t of word k is token 32 k + t."""
    # With high + lost = exact for w and x: w·x - w_high·x_high = w·x_lost + w_lost·x_high, so that by
    # Cauchy-Schwarz |error| <= |w| |x_lost| + |w_lost| |x_high| + accumulation |w_high| |x_high|.
    (w, w_norm, w_lost), (x, x_norm, x_lost) = (_rounded(a) if bf16 else _unrounded(a) for a in (W_enc, xc))
    # 64 more terms stand for the last product of the kernel and for the float32 sums that decide.
    near = x_lost + ACCUMULATION * ((1 if bf16 else 3) * x.shape[1] + 64) * x_norm
    # 2^-18 covers the additions of b_enc and what three bfloat16 parts leave of it; 1.02 on both sides that
    # of the bound, the rounding of its two factors to bfloat16, and high for exact in the last term
    bias, parts = b_enc + 2.0**-18 * b_enc.abs(), []
    for _ in range(3):
        parts.append(bias.bfloat16())
        bias = bias - parts[-1].float()
    w_more = _columns(*parts, 1.02 * w_norm, 1.02 * w_lost)
    one = torch.ones_like(near)
    x_more = _columns(one, one, one, 1.02 * near, 1.02 * (x_norm + x_lost))
    (latents, width), tokens = w.shape, len(x)
    tile_n, tile_k = (256, 64) if bf16 else (128, 32)
    tiles = triton.cdiv(tokens, tile_n)
    words = torch.empty(latents, tiles * tile_n // 32, dtype=torch.int32, device=x.device)
    mask_kernel[(triton.cdiv(latents, 128) * tiles,)](
        w, x, w_more, x_more, words, latents, tokens, width, words.shape[1],
        EVEN=width % tile_k == 0, PRECISION="ieee" if bf16 else "tf32x3", MORE=16,
        BLOCK_M=128, BLOCK_N=tile_n, BLOCK_K=tile_k, WIDTH=8, num_warps=8, num_stages=3,
    )  # fmt: skip
    return words


def _columns(*columns: Tensor) -> Tensor:
    """Join columns to bfloat16 [rows, 16], the fewest that the tensor cores take."""
    joined = torch.zeros(len(columns[0]), 16, dtype=torch.bfloat16, device=columns[0].device)
    joined[:, : len(columns)] = torch.stack([column.float() for column in columns], 1)
    return joined


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows to bfloat16, padded to a multiple of 64; also their norms and what rounding took."""
    count, width = rows.shape
    padded = triton.cdiv(width, 64) * 64
    high = torch.empty(count, padded, dtype=torch.bfloat16, device=rows.device)
    norm, lost = torch.empty(2, count, device=rows.device)
    round_kernel[(triton.cdiv(count, 4),)](
        rows, high, norm, lost, count,
        D=width, K=padded, ROWS=4, BLOCK=triton.next_power_of_2(padded), num_warps=4,
    )  # fmt: skip
    return high, norm, lost


def _unrounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return rows, torch.linalg.vector_norm(rows, dim=1), rows.new_zeros(len(rows))


def decode_and_loss(
    x: Tensor, active: Active, W_dec: Tensor, b_dec: Tensor, loss: Loss,
    weight: Tensor | None = None, total: int | None = None,
) -> Decoded:  # fmt: skip
    """Reconstruct tokens from their active latents, with the reconstruction term and its gradient.

    Parameters
    ----------
    x : float32 [N, d]
    active : the result of `active_set` on these tokens
    W_dec : float32 [m, d]
    b_dec : float32 [d]
    loss : which reconstruction term (`SAE.losses`; facts.md §4.1)
    weight : float32 [N], factor of each token's error (1 if omitted)
    total : tokens that the objective averages over, when other processes hold more of them (N if omitted)

    Raises
    ------
    PatchSAEError : a tensor has another shape or type, or is not contiguous.
    """
    (tokens, width), latents = x.shape, len(active.start) - 1
    _check(("x", x, (tokens, width)), ("W_dec", W_dec, (latents, width)), ("b_dec", b_dec, (width,)))
    if weight is not None:
        _check(("weight", weight, (tokens,)))
    with torch.cuda.device_of(x):
        # Half as many passes of the radix sort when the token fits into 16 bits
        keys = active.token.to(torch.int16) if tokens <= 1 << 15 else active.token
        keys, order = keys.sort(stable=True)  # stable: latents ascend inside a token
        start = torch.searchsorted(keys, torch.arange(tokens, device=x.device, dtype=keys.dtype))
        start = torch.cat((start, start.new_tensor([len(keys)])))
        x_hat, g, error = torch.empty_like(x), torch.empty_like(x), x.new_empty(tokens)
        decode_kernel[(tokens,)](
            x, b_dec, W_dec, start, _owners(active.start, len(keys))[order], active.value[order],
            x if weight is None else weight, x_hat, g, error, total or tokens,
            OVER_NORM=loss is Loss.MSE_OVER_NORM, WEIGHTED=weight is not None,
            D=width, **_row_blocks(width, 8),
        )  # fmt: skip
    return Decoded(x_hat, g, error)


def dense_gradients(
    active: Active, xc: Tensor, g: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, l1: float,
    ghost: GhostRows | None = None, subtract_b_dec: bool = True, total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of W_enc [m, d], b_enc [m], W_dec [m, d] (not projected) and b_dec [d].

    Parameters are those of `adam_step`; nothing is changed.
    """
    moments = [(torch.empty_like(p), p) for p in (W_enc, b_enc, W_dec)]  # the second is not touched
    share = l1 / (total or len(xc))
    b_dec = _by_latent(active, xc, g, W_enc, b_enc, W_dec, moments, share, ghost, subtract_b_dec)
    return *(first for first, _ in moments), b_dec


def adam_step(
    active: Active, xc: Tensor, g: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor,
    moments: list[tuple[Tensor, Tensor]], lr: float, step: int, l1: float,
    ghost: GhostRows | None = None, subtract_b_dec: bool = True, total: int | None = None,
) -> Tensor:  # fmt: skip
    """Take torch.optim.Adam's step in place on W_enc, b_enc and W_dec and return b_dec's gradient [d].

    Before the step the part of W_dec's gradient along each row is removed, after it rows get unit length,
    as in `SAE.project_decoder_gradient` and `SAE.normalise_decoder`. Latents without entries move too, by
    momentum.

    Parameters
    ----------
    active : the result of `active_set`
    xc : float32 [N, d], the tokens it was given
    g : float32 [N, d], `Decoded.g`
    W_enc, b_enc, W_dec : float32 [m, d], [m], [m, d]
    moments : (exp_avg, exp_avg_sq) of W_enc, of b_enc and of W_dec
    lr : learning rate
    step : number of this step, from 1
    l1 : weight λ of the L1 penalty
    ghost : gradients to add
    subtract_b_dec : whether xc is x - b_dec, rather than x
    total : as in `decode_and_loss`

    Raises
    ------
    PatchSAEError : a tensor has another shape or type, or is not contiguous.
    """
    share = l1 / (total or len(xc))
    return _by_latent(active, xc, g, W_enc, b_enc, W_dec, moments, share, ghost, subtract_b_dec, (lr, step))


def _by_latent(active, xc, g, W_enc, b_enc, W_dec, moments, share, ghost, centred, adam=None) -> Tensor:
    (latents, width), tokens, entries = W_enc.shape, len(xc), len(active.token)
    _check(("xc", xc, (tokens, width)), ("g", g, (tokens, width)), ("b_enc", b_enc, (latents,)))
    _check(("W_enc", W_enc, (latents, width)), ("W_dec", W_dec, (latents, width)))
    for name, pair, like in zip(("W_enc", "b_enc", "W_dec"), moments, (W_enc, b_enc, W_dec), strict=True):
        _check(*((f"moments of {name}", moment, like.shape) for moment in pair))
    with torch.cuda.device_of(xc):
        count = active.start.diff()
        split = _offsets(torch.where(count > CAP, (count + CAP - 1) // CAP, 0))
        # Latents above CAP have at most entries / CAP full parts and one begun part each
        parts = max(1, 2 * (entries // CAP))
        owner = torch.searchsorted(split, torch.arange(parts, device=xc.device), right=True) - 1
        part_enc, part_dec = xc.new_empty(2, parts, width)
        part_bias = xc.new_empty(parts)
        blocks = _row_blocks(width, 4)  # with 8 a multiprocessor's registers hold two programs only
        lists = (xc, g, active.token, active.value, active.start, split)
        split_kernel[(parts,)](
            *lists, owner, W_dec, part_dec, part_enc, part_bias, share, latents,
            D=width, CAP=CAP, **blocks,
        )  # fmt: skip
        slot = active.start
        if ghost is not None:
            slot = torch.full((latents,), -1, device=xc.device)
            slot[ghost.latents] = torch.arange(len(ghost.latents), device=xc.device)
        lr, step = adam or (0.0, 1)
        back = xc.new_empty(triton.cdiv(latents, GROUP), width)
        update_kernel[(len(back),)](
            *lists, part_dec, part_enc, part_bias, slot, *(ghost[1:] if ghost else (xc, xc, xc)),
            W_enc, b_enc, W_dec, *(moment for pair in moments for moment in pair), back,
            latents, share, lr / (1 - 0.9**step), (1 - 0.999**step) ** 0.5,
            UPDATE=adam is not None, GHOST=ghost is not None, CENTRED=centred,
            BETA1=0.9, BETA2=0.999, EPS=1e-8, D=width, GROUP=GROUP, **blocks,
        )  # fmt: skip
        return g.sum(0) + back.sum(0)


def _row_blocks(width: int, entries: int) -> dict[str, int]:
    """Choose tiles of whole rows, at most 8 numbers of each row in a thread up to a width of 2048."""
    block = triton.next_power_of_2(width)
    return {"BLOCK_E": entries, "BLOCK_D": block, "num_warps": max(1, min(8, block // 256))}


def _offsets(count: Tensor) -> Tensor:
    """Sum counts [n] to the offsets [n + 1] where each begins, int64."""
    start = torch.zeros(len(count) + 1, dtype=torch.int64, device=count.device)
    torch.cumsum(count, 0, out=start[1:])
    return start


def _owners(start: Tensor, entries: int) -> Tensor:
    """Name the latent of each entry: int32 [entries]. The length spares a wait for the device."""
    latent = torch.arange(len(start) - 1, dtype=torch.int32, device=start.device)
    return latent.repeat_interleave(start.diff(), output_size=entries)


def _check(*tensors: tuple[str, Tensor, tuple[int, ...]]) -> None:
    for name, tensor, shape in tensors:
        found = (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())
        if found != (tuple(shape), torch.float32, True):
            raise PatchSAEError(
                f"{name} must be contiguous float32 {list(shape)}; "
                f"got {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}."
            )


class Slopes(NamedTuple):
    """What the gradients are made of."""

    active: Active
    tokens: Tensor  # [N, d] what the encoder saw, x - b_dec
    g: Tensor  # [N, d] gradient with respect to x̂


def forward(
    sae: SAE, x: Tensor, weight: Tensor | None, bf16: bool, count: Callable[[str, float], None]
) -> Pass:
    """Encode and decode tokens x [N, d]; `weight` [N] multiplies their errors, `count` takes seconds."""
    started = time.perf_counter()
    xc = x - sae.b_dec if sae.config.subtract_b_dec else x
    active = active_set(xc, sae.W_enc, sae.b_enc, bf16)
    found = time.perf_counter()
    count("encoder", found - started)
    x_hat, g, error = decode_and_loss(x, active, sae.W_dec, sae.b_dec, sae.config.loss, weight)
    loss, total = torch.stack((error.double().mean(), active.value.sum(dtype=torch.float64))).tolist()
    count("decode", time.perf_counter() - found)
    fired = active.start.diff() > 0
    return Pass(loss, len(active.token), total, fired, x_hat, Slopes(active, xc, g))


def gradients(sae: SAE, done: Pass, ghost: GhostRows | None) -> dict[str, Tensor]:
    """Compute the dense gradient of every parameter (W_dec's component along its rows included)."""
    weights, config = (sae.W_enc, sae.b_enc, sae.W_dec), sae.config
    found = dense_gradients(*done.slopes, *weights, sae.l1, ghost, config.subtract_b_dec)
    return dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), found, strict=True))


def update(
    sae: SAE, done: Pass, ghost: GhostRows | None, moments: Mapping[str, tuple[Tensor, Tensor]],
    lr: float, step: int,
) -> Tensor:  # fmt: skip
    """Take Adam step number `step` on every latent, in place; return the gradient of b_dec."""
    weights, config = (sae.W_enc, sae.b_enc, sae.W_dec), sae.config
    pairs = [moments[name] for name in ("W_enc", "b_enc", "W_dec")]
    return adam_step(*done.slopes, *weights, pairs, lr, step, sae.l1, ghost, config.subtract_b_dec)
