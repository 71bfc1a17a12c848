"""Ghost gradients beside the sparse step: dense in the dead latents by nature, and in nothing else."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchsae.sae.model import SAE, Loss


class GhostRows(NamedTuple):
    """Gradients that dead latents get besides those of the sparse objective."""

    latents: Tensor  # [k] int64, distinct
    W_enc: Tensor  # [k, d]
    b_enc: Tensor  # [k]
    W_dec: Tensor  # [k, d]


class Pass(NamedTuple):
    """What a forward pass leaves for the backward one."""

    loss: float
    """Reconstruction term."""
    active: int
    """Active entries."""
    total: float
    """Their sum."""
    fired: Tensor  # [d_sae] bool
    output: Tensor  # [N, d]
    slopes: NamedTuple
    """The device's own lists and gradients."""


@torch.no_grad()
def ghost_gradients(
    sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor, is_cls: Tensor | None, tile: int = 512
) -> tuple[float, GhostRows]:
    """Compute the ghost term (`SAE`, facts.md §4.2) and its gradients for the dead latents alone.

    Dense in the dead latents by its nature, so it runs through tiles of tokens: no [tokens, dead] array.
    """
    rows = dead.nonzero().flatten()
    enc, dec, bias = sae.W_enc[rows], sae.W_dec[rows], sae.b_enc[rows]  # [D, d], [D, d], [D]
    for_enc, for_dec, for_bias = torch.zeros_like(enc), torch.zeros_like(dec), torch.zeros_like(bias)
    total, over = 0.0, len(x) * (sae.d_in if sae.config.loss is Loss.MSE_OVER_NORM else 1)
    centred = x - sae.b_dec if sae.config.subtract_b_dec else x
    for t in range(0, len(x), tile):
        part = slice(t, t + tile)
        error = sae.weighted_error(x_hat[part], x[part], None if is_cls is None else is_cls[part])
        r = x[part] - x_hat[part]
        z = torch.addmm(bias, centred[part], enc.T)  # [T, D]
        e = z.sub_(z.amax(-1, keepdim=True)).exp_()
        g = e @ dec  # [T, d]
        scale = r.norm(dim=-1, keepdim=True) / (2 * g.norm(dim=-1, keepdim=True) + 1e-6)
        g *= scale
        term = sae.error(g, r)
        weight = error / (term + 1e-6)
        total += (term * weight).sum().item() / over
        slope = 2 * (g - r) * weight * scale / over
        if sae.config.loss is Loss.MSE_OVER_NORM:
            slope /= r.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        for_dec.addmm_(e.T, slope)
        dz = e.mul_(slope @ dec.T)
        for_enc.addmm_(dz.T, centred[part])
        for_bias += dz.sum(0)
    return total, GhostRows(rows, for_enc, for_bias, for_dec)
