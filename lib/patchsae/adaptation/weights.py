"""Adaptation of CLIP's own weights, to compare learned tokens with: low-rank changes (LoRA), fine-tuning.

    LoRA    W ↦ W + B A / r    query, key and value of every block, in both towers; B is 0 at first
    full    W ↦ W + D          every weight of the image tower; D is 0 at first

No token is added, and words are the data set's own template. The adapted backbone has a copy of the model
with the changed weights in it; only A and B, or D, are kept on disk. LoRA in these places and of this rank
is how others adapt CLIP to a few images (CLIP-LoRA, 2024). With D in place of W, weight decay draws
towards CLIP and not towards 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from patchsae.adaptation.adapted import Adapted
from patchsae.adaptation.prompt_text import TextTower
from patchsae.adaptation.recipe import Recipe
from patchsae.clip.backbone import Backbone
from patchsae.runs.errors import PatchSAEError, choose


class Change(StrEnum):
    """Which weights are changed, and how."""

    LORA = "lora"  # attention of both towers, by a product of two thin matrices
    FULL = "full"  # the image tower, freely


LR = {Change.LORA: 0.1, Change.FULL: 1e-5}
"""Step sizes for the small CLIP, five passes in batches of four: of 0.003 … 0.3 (lora), 3e-6 … 0.03 (full)
the ones most accurate on training images of two data sets that nothing was learned from."""


@dataclass(frozen=True)
class WeightConfig:
    """Which weights are learned."""

    method: Change = Change.LORA
    """Which weights are changed, and how."""
    rank: int = 2
    """Columns r of B and rows of A (lora)."""
    template: str = "a photo of a {}."
    """Prompt of a class: the data set's own."""

    def __post_init__(self):
        choose(self, "method", Change)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise PatchSAEError(f"rank={self.rank} must be a whole number of at least 1.")

    def text(self, classname: str) -> str:
        """Return the prompt of a class."""
        return self.template.format(classname.replace("_", " "))


@dataclass(frozen=True)
class WeightTrainConfig(WeightConfig, Recipe):
    """Which weights are learned, and how; `usual` gives the step sizes found here."""

    def __post_init__(self):
        WeightConfig.__post_init__(self)
        Recipe.__post_init__(self)

    @classmethod
    def usual(cls, method: str, **given: object) -> WeightTrainConfig:
        """Return the recipe with the step size of a method, where none is given."""
        return cls(**{"method": method, "lr": LR[Change(method)]} | given)

    @property
    def learned(self) -> WeightConfig:
        """Return what is learned, without how."""
        return WeightConfig(**{field.name: getattr(self, field.name) for field in fields(WeightConfig)})


class LowRank(nn.Module):
    """Add B A / r to query, key and value: weights [3·d, d] held together by PyTorch's attention."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        d = weight.shape[1]
        self.A = nn.Parameter(torch.empty(3, rank, d).uniform_(-1, 1) * math.sqrt(3 / d))
        self.B = nn.Parameter(torch.zeros(3, d, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A).flatten(0, 1).to(weight.dtype) / self.A.shape[1]


class Difference(nn.Module):
    """Add a matrix of the same shape."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.D = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.D.to(weight.dtype)


class TunedBackbone(Adapted):
    """Be a backbone with changed weights, in a model of its own.

    Until `settle` is called the changes are parameters that gradients reach.
    """

    def __init__(self, plain: Backbone, config: WeightConfig, seed: int = 0):
        if isinstance(plain, Adapted):
            raise PatchSAEError(f"{plain.name} is adapted already: adapt the plain backbone.")
        model = copy.deepcopy(plain.model)
        super().__init__(
            model,
            plain.block,
            name=f"{plain.name}+{config.method}",
            tokenizer=lambda: plain.tokenize,
            config={"clip": plain._config, "weights": asdict(config)},
        )
        self._plain, self.what = (plain,), config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.learned = nn.ModuleDict(
                {_key(path): _change(module, name, config) for path, module, name in _places(model, config)}
            ).to(self.device)
        if not len(self.learned):
            raise PatchSAEError(
                f"{plain.name} has no attention of PyTorch's own, which lora changes: choose "
                "a CLIP such as ViT-B-16-quickgelu, or method=full."
            )
        self.text_tower = TextTower(self) if config.method is Change.LORA else None
        for path, module, name in list(_places(model, config)):
            parametrize.register_parametrization(module, name, self.learned[_key(path)])
        self.learned.requires_grad_(False)

    def settle(self) -> None:
        """Write the changes into the weights, so that a pass costs what CLIP's costs."""
        super().settle()
        for module in list(self.model.modules()):
            for name in list(getattr(module, "parametrizations", ())):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        self.model.requires_grad_(False)


def _places(model: nn.Module, config: WeightConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, module and name of each weight that changes."""
    if config.method is Change.LORA:
        for path, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:
                yield f"{path}.in_proj_weight", module, "in_proj_weight"
        return
    for path, module in model.visual.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield f"visual.{path}.{name}".replace("..", "."), module, name


def _change(module: nn.Module, name: str, config: WeightConfig) -> nn.Module:
    weight = getattr(module, name)
    return LowRank(weight, config.rank) if config.method is Change.LORA else Difference(weight)


def _key(path: str) -> str:
    return path.replace(".", "/")  # a ModuleDict takes no dots
