"""How good is an SAE: reconstruction, sparsity, and what is left of zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backbone import Backbone, zero_shot_logits
from .images import ImageSet
from .sae import SAE
from .training import Tokens, token_columns


class Reconstruction(NamedTuple):
    """Averages over all tokens of an image set (facts.md §7)."""

    mse: float
    """Mean of (x̂ - x)² / ‖x‖, the unit of Table 2."""
    fvu: float
    """Σ‖x - x̂‖² / Σ‖x - x̄‖²: 0 perfect, 1 no better than the mean."""
    cosine: float
    """Mean cosine of x and x̂."""
    l0: float
    """Mean number of active latents per token."""
    l1: float
    """Mean sum of latents per token."""
    dead_share: float
    """Share of latents that fire on no token of the set."""
    tokens: int
    """Tokens seen."""


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@torch.no_grad()
def reconstruction(
    sae: SAE, backbone: Backbone, images: ImageSet, tokens: Tokens = Tokens.ALL, batch_size: int = 32
) -> Reconstruction:
    """Measure an SAE on every token of an image set, in one pass and float64 sums."""
    columns = torch.from_numpy(token_columns(backbone, tokens)).to(backbone.device)
    n, mse, cosine, l0, l1, error = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=backbone.device)
    square = 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=backbone.device)
    for batch in images.batches(batch_size, progress="measuring the SAE"):
        x = backbone.residual(backbone.normalize(batch.images))[:, columns].flatten(0, 1).float()
        f = sae.encode(x)
        x_hat = sae.decode(f)
        gap = (x - x_hat).square()
        n += len(x)
        mse += (gap.mean(-1) / x.norm(dim=-1)).sum().item()
        cosine += torch.cosine_similarity(x, x_hat, dim=-1).sum().item()
        l0 += (f > 0).sum().item()
        l1 += f.sum(dtype=torch.float64).item()
        error += gap.sum(dtype=torch.float64).item()
        total += x.double().sum(0)
        square += x.double().square().sum().item()
        fired |= (f > 0).any(0)
    spread = square - (total.square().sum() / n).item()
    dead = 1 - fired.float().mean().item()
    return Reconstruction(mse / n, error / spread, cosine / n, l0 / n, l1 / n, dead, n)


def through_sae(sae: SAE, backbone: Backbone, tokens: Tokens = Tokens.ALL) -> Callable[[Tensor], Tensor]:
    """Return an edit that replaces tokens [B, T, d] by their reconstruction (mode `replace`)."""
    columns = torch.from_numpy(token_columns(backbone, tokens)).to(backbone.device)

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, columns] = sae(x[:, columns].float()).to(x.dtype)
        return x

    return edit


def zeroed(x: Tensor) -> Tensor:
    """Replace every token by zero: the floor that 'recovered' scores are measured from."""
    return torch.zeros_like(x)


@torch.no_grad()
def zero_shot_predictions(
    backbone: Backbone,
    images: ImageSet,
    text: Tensor,
    edits: Sequence[Callable[[Tensor], Tensor] | None],
    batch_size: int = 32,
    progress: str | None = "classifying",
) -> np.ndarray:
    """Classify images under several edits of the residual stream, the trunk run once.

    Parameters
    ----------
    text : [C, e], from `zero_shot_weights`
    edits : functions [B, T, d] to [B, T, d]; None leaves the stream as it is

    Returns
    -------
    int64 [len(edits), N]
    """
    rows: list[list[np.ndarray]] = [[] for _ in edits]
    for batch in images.batches(batch_size, progress=progress):
        x = backbone.residual(backbone.normalize(batch.images))
        for row, edit in zip(rows, edits, strict=True):
            logits = zero_shot_logits(backbone, backbone.finish(x if edit is None else edit(x)), text)
            row.append(logits.argmax(-1).cpu().numpy())
    return np.stack([np.concatenate(row) for row in rows])


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 2000) -> Interval:
    """Return the mean of `values` [N] with a percentile interval over resampled images."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)])
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))
