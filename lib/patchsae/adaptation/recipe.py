"""How a model is adapted: step sizes, schedule, crops. What is learned has a configuration of its own."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum

from patchsae.runs.errors import PatchSAEError, choose


class Precision(StrEnum):
    """What CLIP's blocks compute in during training; what is learned, and losses, stay float32."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    FP16 = "fp16"


@dataclass(frozen=True)
class Recipe:
    """How something is learned; the defaults are MaPLe's base-to-novel recipe (facts.md §1.2)."""

    epochs: int = 5
    """Passes over the images."""
    batch_size: int = 4
    """Images per step; those left over at the end of an epoch are not seen in it."""
    lr: float = 0.0035
    """Step size of SGD after warm-up; it falls along a cosine, once per epoch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    warmup_epochs: int = 1
    """Epochs at the start with warmup_lr."""
    warmup_lr: float = 1e-5
    """Step size during warm-up."""
    augment: bool = True
    """Whether images are cropped and flipped at random."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of an image that a random crop shows."""
    precision: Precision = Precision.FLOAT32
    """What the blocks compute in. The published runs used fp16, without loss scaling, on a GPU."""
    seed: int = 1
    """Decides the start, the order of images and the crops."""
    workers: int = 0
    """Processes that decode images. Does not change results."""
    cache_mb: int = 512
    """Decoded images kept in memory, where workers=0, in MB. Does not change results."""
    checkpoint_share: float = 0.03
    """Share of the time that may go into checkpoints. Does not change results."""

    def __post_init__(self):
        choose(self, "precision", Precision)
        for name in ("epochs", "batch_size", "lr", "checkpoint_share"):
            if not getattr(self, name) > 0:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("momentum", "weight_decay", "warmup_lr", "seed", "workers", "cache_mb"):
            if not getattr(self, name) >= 0:
                raise PatchSAEError(f"{name}={getattr(self, name)} must not be negative.")
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))  # JSON makes a list of it
        if not (len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1):
            raise PatchSAEError(f"crop_scale={self.crop_scale} must be two shares, 0 < low ≤ high ≤ 1.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise PatchSAEError(f"warmup_epochs={self.warmup_epochs} must be in 0..{self.epochs - 1}.")

    def inputs(self) -> dict[str, object]:
        """Return what decides the result, for the stage's hash."""
        idle = ("workers", "cache_mb", "checkpoint_share")
        return {key: value for key, value in asdict(self).items() if key not in idle}

    def rate(self, epoch: int) -> float:
        """Return the step size of an epoch, counted from 0: constant, then a cosine that starts anew."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs)) / 2
