"""One optimiser step of the autoencoder, dense or exactly sparse, whichever is faster."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .sae import SAE


class Execution(StrEnum):
    """How a training step is computed; the numbers agree to 1e-5."""

    AUTO = "auto"  # sparse below the density where it stops paying, dense above
    DENSE = "dense"
    SPARSE = "sparse"
    SPARSE_F32 = "sparse_f32"  # sparse, and no bf16 candidate pass even where the processor has bf16 units


class Step(NamedTuple):
    """What one optimiser step saw."""

    reconstruction: float
    l1: float
    """Already multiplied by λ."""
    ghost: float
    l0: float
    """Mean number of active latents per token."""
    fired: Tensor
    """Which latents were active on any token: bool [d_sae]."""
    output: Tensor
    """Reconstruction before the update: [N, d_in]."""


class Stepper:
    """Own an SAE's optimiser state and take Adam steps on batches of tokens."""

    def __init__(self, sae: SAE, execution: Execution = Execution.AUTO):
        self.sae, self.execution = sae, Execution(execution)
        self.adam = torch.optim.Adam(sae.parameters(), fused=sae.W_dec.device.type in ("cpu", "cuda"))

    def step(
        self, x: Tensor, lr: float, dead: Tensor | None = None, is_cls: Tensor | None = None
    ) -> Step:
        """Take one step on tokens x [N, d_in]; `dead` and `is_cls` as in `SAE.losses`."""
        return self._dense(x, lr, dead, is_cls)

    def _dense(self, x: Tensor, lr: float, dead: Tensor | None, is_cls: Tensor | None) -> Step:
        for group in self.adam.param_groups:
            group["lr"] = lr
        out = self.sae.losses(x, dead, is_cls)
        out.total.backward()
        self.sae.project_decoder_gradient()
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.sae.normalise_decoder()
        self.sae.track_threshold(out.latents)
        active = out.latents.detach() > 0
        return Step(
            out.reconstruction.item(),
            out.l1.item(),
            out.ghost.item(),
            active.sum().item() / len(x),
            active.any(0),
            out.output.detach(),
        )
