"""What an autoencoder starts at: its decoder bias, and the rows of its encoder and decoder."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.processes import Processes
from patchsae.sae.model import SAE
from patchsae.training.stream import TokenStream

if TYPE_CHECKING:  # training imports this module
    from patchsae.training.trainer import TrainConfig


class Start(StrEnum):
    """What the rows of encoder and decoder start at."""

    RANDOM = "random"  # directions drawn at random: the paper
    DATA = "data"  # tokens of the run's first images, centred and of unit length


class BiasInit(StrEnum):
    """What b_dec starts at (facts.md §4.3)."""

    GEOMETRIC_MEDIAN = "geometric_median"  # of tokens
    GEOMETRIC_MEDIAN_IMAGES = "geometric_median_images"  # of images as T·d vectors: the released code
    MEAN = "mean"
    ZEROS = "zeros"


@torch.no_grad()
def set_start(
    sae: SAE,
    stream: TokenStream,
    config: TrainConfig,
    processes: Processes = Processes(),  # noqa: B008  (immutable)
) -> None:
    """Give an SAE that was just made the decoder bias and the rows that a run on this stream starts at."""
    from_data = config.start is Start.DATA
    if processes.first and (from_data or config.b_dec_init is not BiasInit.ZEROS):
        images = math.ceil(config.bias_tokens / stream.activations.tokens)
        if config.b_dec_init is BiasInit.GEOMETRIC_MEDIAN_IMAGES:
            images = config.bias_images
        tokens = stream.first(images)
        sae.b_dec.copy_(initial_bias(tokens, config.b_dec_init))
        if from_data:
            rows = initial_rows(tokens, sae.b_dec, sae.d_sae, config.seed)
            sae.W_dec[: len(rows)] = rows  # more latents than tokens: the others stay as drawn
    processes.share(sae.b_dec.data)
    if from_data:
        processes.share(sae.W_dec.data)
        sae.W_enc.copy_(sae.W_dec)


def initial_bias(tokens: Tensor, kind: BiasInit) -> Tensor:
    """Compute the start of b_dec [d] from the tokens [I, T, d] of some images."""
    points = tokens.flatten(0, 1)
    match kind:
        case BiasInit.ZEROS:
            return points.new_zeros(points.shape[1])
        case BiasInit.MEAN:
            return points.mean(0)
        case BiasInit.GEOMETRIC_MEDIAN:
            return geometric_median(points)
        case BiasInit.GEOMETRIC_MEDIAN_IMAGES:
            return geometric_median_images(tokens)


def initial_rows(tokens: Tensor, centre: Tensor, rows: int, seed: int) -> Tensor:
    """Draw tokens of [I, T, d] without repetition: at most `rows`, less `centre`, of unit length [R, d]."""
    points = tokens.flatten(0, 1) - centre
    points = points[points.norm(dim=-1) > 1e-6]  # one that is the centre has no direction
    drawn = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:rows]
    return torch.nn.functional.normalize(points[drawn.to(points.device)], dim=-1)


def geometric_median_images(tokens: Tensor) -> Tensor:
    """Find the released code's start of b_dec for tokens [I, T, d]: images, not tokens, are the points.

    The geometric median of the images as vectors of length T·d is a token per position; their mean is
    returned, [d] (facts.md §4.3).
    """
    if tokens.ndim != 3:
        raise PatchSAEError(f"tokens must be [I, T, d]; got shape {tuple(tokens.shape)}.")
    return geometric_median(tokens.flatten(1), tolerance=1e-20).view(tokens.shape[1:]).mean(0)


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """Find the point with the least sum of distances to `points` [N, d] by Weiszfeld's iteration.

    Starts at the mean and stops when the objective falls by less than `tolerance` of itself
    (facts.md §4.3). Returns [d].
    """
    if points.ndim != 2 or not len(points):
        raise PatchSAEError(f"points must be [N, d] with N > 0; got shape {tuple(points.shape)}.")
    centre, last = points.mean(0), torch.inf
    for _ in range(iterations):
        distance = (points - centre).norm(dim=-1).clamp(min=1e-6)
        total = distance.sum().item()
        if last - total <= tolerance * total:
            break
        last = total
        weight = 1 / distance
        centre = (points * weight[:, None]).sum(0) / weight.sum()
    return centre
