"""Images cropped and flipped at random, the same way whenever a step is computed again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchsae.runs import compat  # noqa: F401  (must come before torchvision)

# isort: split
from torchvision.transforms import InterpolationMode, v2

from patchsae.images.loading import Source
from patchsae.images.sets import ImageSet


class Crops(Source):
    """Batches of an image set as CLIP's prompts are trained on (facts.md §1.2): uint8 [B, 3, S, S].

    A batch is asked for by a list whose first number is the step and whose others are images: the crops
    depend on the seed and the step alone, so a run that goes on draws what it would have drawn.

    size : S, in pixels
    scale : smallest and largest share of an image that a crop shows; None takes the images as they are
    keep_bytes : decoded images kept in memory, up to this many bytes
    """

    def __init__(
        self,
        images: ImageSet,
        size: int,
        scale: tuple[float, float] | None,
        seed: int,
        keep_bytes: int = 0,
    ):
        self.images, self.name, self.seed, self.room = images, images.name, seed, keep_bytes
        self.kept: dict[int, Image.Image | Tensor] = {}
        # the undistorted original, where the set has it
        self.whole = images.picture if scale else None
        self.change = scale and v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
            ]
        )

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the images [1:] of a list whose first number is the step."""
        step, *numbers = indices
        if self.change is None:
            return torch.stack([self._image(number) for number in numbers])
        draw = np.random.default_rng([self.seed, step]).integers(2**63)
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's global generator
            torch.default_generator.manual_seed(int(draw))
            changed = [self.change(self._image(number)) for number in numbers]
        return torch.stack([image.as_subclass(Tensor) for image in changed])

    def _image(self, number: int) -> Image.Image | Tensor:
        if number not in self.kept:
            image = self.whole(number) if self.whole else self.images.load([number]).images[0].cpu()
            size = image.nbytes if isinstance(image, Tensor) else 3 * image.width * image.height
            if size > self.room:
                return image
            self.room -= size
            self.kept[number] = image
        return self.kept[number]
