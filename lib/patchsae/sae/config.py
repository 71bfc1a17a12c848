"""What an autoencoder is: its size, its nonlinearity, what it is trained for."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from enum import StrEnum

from patchsae.runs.checks import check_counts
from patchsae.runs.errors import PatchSAEError, choose

MOST_LATENTS = 2**31 - 1  # they are counted in 32 bits


class Loss(StrEnum):
    """What 'reconstruction error' means (facts.md §4.1)."""

    MSE_OVER_NORM = "mse_over_norm"  # mean of (x̂ - x)² / ‖x‖: the released code, the unit of Table 2
    SQUARED_ERROR = "squared_error"  # ‖x̂ - x‖²: Eq. 2 as printed


class Activation(StrEnum):
    """Which pre-activations survive as latents; all of them are non-negative."""

    RELU = "relu"  # the positive ones: the paper
    TOPK = "topk"  # the k largest of each token
    BATCHTOPK = "batchtopk"  # the k·N largest of a training batch; above a fixed threshold afterwards
    JUMPRELU = "jumprelu"  # those above a threshold of the latent's own; for imported weights


class InputNorm(StrEnum):
    """What is done to a token before the encoder and undone after the decoder; for imported weights."""

    NONE = "none"
    LAYER_NORM = "layer_norm"  # mean 0 and standard deviation 1 over dimensions
    UNIT_RMS = "unit_rms"  # length √d_in


@dataclass(frozen=True)
class SAEConfig:
    """Size and objective of a sparse autoencoder."""

    d_in: int
    """Width of the residual stream."""
    expansion: float = 64
    """Latents per input dimension: d_sae = expansion · d_in."""
    activation: Activation = Activation.RELU
    """Which pre-activations become latents."""
    k: int = 0
    """Active latents per token, for topk and batchtopk."""
    loss: Loss = Loss.MSE_OVER_NORM
    """Reconstruction term."""
    l1: float = 8e-5
    """Weight λ of the L1 penalty."""
    ghost: bool = True
    """Whether dead latents get ghost gradients."""
    cls_weight: float = 1.0
    """Weight of the CLS token's reconstruction error against a patch's."""
    subtract_b_dec: bool = True
    """Whether the encoder sees x - b_dec (the paper, footnote 2) or x."""
    input_norm: InputNorm = InputNorm.NONE
    """How tokens are normalised before the encoder."""

    def __post_init__(self):
        for name, kind in (("loss", Loss), ("activation", Activation), ("input_norm", InputNorm)):
            choose(self, name, kind)
        # a configuration may come from a file of anybody's, where 0 is not False and '64' no number
        check_counts(d_in=self.d_in)
        check_counts(0, k=self.k)
        for name, least in (("expansion", 1e-9), ("l1", 0.0), ("cls_weight", 0.0)):
            value = getattr(self, name)
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real or not least <= value < float("inf"):
                raise PatchSAEError(f"{name}={value!r} must be a finite number of at least {least}.")
        for name in ("ghost", "subtract_b_dec"):
            if not isinstance(getattr(self, name), bool):
                raise PatchSAEError(f"{name}={getattr(self, name)!r} must be true or false.")
        if not 0.5 < self.expansion * self.d_in <= MOST_LATENTS:  # 0.5 is rounded to none
            raise PatchSAEError(
                f"expansion={self.expansion} of d_in={self.d_in} makes no number of latents from 1 to "
                f"{MOST_LATENTS}; give another."
            )
        if self.activation in (Activation.TOPK, Activation.BATCHTOPK) and not 1 <= self.k <= self.d_sae:
            raise PatchSAEError(
                f"activation='{self.activation}' needs k from 1 to {self.d_sae} latents; got k={self.k}."
            )

    @property
    def d_sae(self) -> int:
        return round(self.expansion * self.d_in)
