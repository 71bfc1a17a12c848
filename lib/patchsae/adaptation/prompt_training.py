"""Learn prompts, or changes of weights, from a few images per class by MaPLe's published recipe.

A run can be killed at any moment: started again, it goes on from its last checkpoint and ends with the
same bits. Everything random is a function of the seed and the step, so a checkpoint holds no generator.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsae.adaptation.adapted import Adapted
from patchsae.adaptation.prompt_files import CARD, WEIGHTS, load_prompts, save_prompts
from patchsae.adaptation.prompt_text import PackedTexts
from patchsae.adaptation.prompts import PromptConfig, adapt
from patchsae.adaptation.recipe import Precision, Recipe
from patchsae.adaptation.weights import TunedBackbone, WeightConfig, WeightTrainConfig
from patchsae.clip.backbone import Backbone, zero_shot_logits
from patchsae.images.augmentation import Crops
from patchsae.images.loading import read_batches
from patchsae.images.sets import ImageSet
from patchsae.runs.cadence import Cadence
from patchsae.runs.disk import remove
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.products import fast_float32
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import Stage, digest
from patchsae.runs.tensors import save_tensors
from patchsae.training.trainer import METRICS, open_checkpoint, read_metrics, write_metrics

VERSION = 1  # raised when the same inputs give other prompts
CHECKPOINT = "checkpoint.safetensors"
_TYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True)
class PromptTrainConfig(PromptConfig, Recipe):
    """Which tokens are learned, and how; the defaults are MaPLe's base-to-novel recipe (facts.md §1.2)."""

    def __post_init__(self):
        PromptConfig.__post_init__(self)
        Recipe.__post_init__(self)
        if not self.depth:
            raise PatchSAEError("depth=0 has no prompts to learn: use a depth of at least 1.")

    @property
    def learned(self) -> PromptConfig:
        """Return what is learned, without how."""
        return PromptConfig(**{field.name: getattr(self, field.name) for field in fields(PromptConfig)})


BASE_TO_NOVEL = PromptTrainConfig()
CROSS_DATASET = PromptTrainConfig(depth=3, epochs=2, lr=0.0026)


class TrainedPrompts(NamedTuple):
    """A finished run."""

    backbone: Adapted
    metrics: list[dict[str, float]]
    """One row per epoch: epoch, step, lr, loss, accuracy (of the training batches, in passing)."""
    folder: Path


def train_prompts(
    backbone: Backbone,
    images: ImageSet,
    config: PromptTrainConfig | WeightTrainConfig,
    root: str | Path,
    progress: bool = True,
) -> TrainedPrompts:
    """Learn prompts on a set's images, all of them (the caller chooses the shots).

    Prompts go to `prompts.safetensors`, the table to `metrics.csv`, in a folder of `root` named by the hash
    of the inputs; if it holds a finished run, that is returned. The prompts after the last step are the
    result. A run that was killed at any moment goes on when it is started again, to the same bits.

    Raises
    ------
    PatchSAEError : as `adapt`; fewer images than a batch; the loss is not finite; the checkpoint is
        damaged or foreign.
    """
    if len(images) < config.batch_size:
        raise PatchSAEError(
            f"'{images.name}' has {len(images)} images, fewer than batch_size={config.batch_size}: give "
            "more images, or a smaller batch."
        )
    inputs = {
        "images": images.fingerprint(),
        "classnames": images.classnames,
        "backbone": backbone.at_block(0).fingerprint(),  # the cut decides nothing here
        "train": config.inputs(),
    }
    what = config.learned
    begin = TunedBackbone if isinstance(what, WeightConfig) else adapt
    start = begin(backbone, what, config.seed)
    stage = Stage.open(root, "prompts", inputs, version=VERSION)
    stage.once(lambda: _Run(start, images, config, stage, progress).go())
    remove(stage.path / CHECKPOINT)
    return TrainedPrompts(load_prompts(stage.path, backbone), read_metrics(stage.path), stage.path)


class _Run:
    """One training run: the state that a checkpoint holds, and the loop over steps."""

    def __init__(
        self,
        adapted: Adapted,
        images: ImageSet,
        config: PromptTrainConfig | WeightTrainConfig,
        stage: Stage,
        progress: bool,
    ):
        self.adapted, self.images, self.config, self.stage = adapted, images, config, stage
        self.progress, self.checkpoint = progress, stage.path / CHECKPOINT
        self.per_epoch = len(images) // config.batch_size
        self.parameters = dict(adapted.learned.named_parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters.values(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.step, self.loss, self.right = 0, 0.0, 0  # the latter two of this epoch
        self.metrics: list[dict[str, float]] = []
        self.seconds = 0.0  # that steps took, in every process that worked on this run

    def go(self) -> None:
        if self.checkpoint.exists():
            self._restore()
        self.adapted.learned.requires_grad_(True)
        self._learn()
        self.adapted.learned.requires_grad_(False)
        config = self.config
        save_prompts(
            self.stage.path, self.adapted, self.images.classnames, config.seed, digest(self.stage.inputs)
        )
        write_metrics(self.stage.path, self.metrics)
        self.stage.finish(
            WEIGHTS,
            CARD,
            METRICS,
            seed=config.seed,
            images=len(self.images),
            steps=self.step,
            training_seconds=self.seconds,
        )

    def _learn(self) -> None:
        config, plans = self.config, self._plans()
        texts, source = self._texts(), self._source()
        bar = progress_bar(
            total=self.step + len(plans),
            initial=self.step,
            desc=f"learning prompts ({config.method})",
            unit="step",
            mininterval=1.0,
            shown=self.progress,
        )
        cadence = Cadence(config.checkpoint_share)
        started, before = time.monotonic(), self.seconds
        with bar:
            for plan, batch in zip(plans, read_batches(source, plans, config.workers), strict=True):
                self._take(batch, self.images.labels[plan[1:]], texts)
                bar.update()
                if self.step % self.per_epoch == 0:
                    self._row()
                    bar.set_postfix({key: f"{self.metrics[-1][key]:.3g}" for key in ("loss", "accuracy")})
                self.seconds = before + time.monotonic() - started
                cadence.save(self._save)

    def _plans(self) -> list[list[int]]:
        """List the steps that are left: the number of the step, then its images."""
        plans = []
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.config.seed, 0, epoch]).permutation(len(self.images))
            batches = order[: self.per_epoch * self.config.batch_size].reshape(self.per_epoch, -1)
            plans += [[len(plans) + n, *images] for n, images in enumerate(batches.tolist())]
        return plans[self.step :]

    def _texts(self) -> PackedTexts | Tensor:
        names, learned = self.images.classnames, self.adapted.text_tower is not None
        return self.adapted.pack_classes(names) if learned else self.adapted.class_weights(names)

    def _source(self) -> Crops:
        config = self.config
        scale = config.crop_scale if config.augment else None
        keep = 0 if config.workers else config.cache_mb * 1_000_000
        return Crops(self.images, self.adapted.image_size, scale, config.seed, keep)

    @fast_float32()
    def _take(self, batch: Tensor, labels: np.ndarray, texts: PackedTexts | Tensor) -> None:
        adapted, config = self.adapted, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step // self.per_epoch)
        tower, target = adapted.tower, torch.from_numpy(labels).to(adapted.device)
        tokens = tower.embed(adapted.normalize(batch))  # outside autocast, so that the stream stays exact
        dtype = _TYPES.get(config.precision)
        with torch.autocast(adapted.device.type, dtype, enabled=dtype is not None):
            pictures = tower.pool(tower.run(tokens, 0, adapted.n_blocks))
            fixed = isinstance(texts, Tensor)  # no word is learned
            words = texts if fixed else adapted.class_embeddings(texts)
        words = F.normalize(words.float(), dim=-1)
        logits = zero_shot_logits(adapted, pictures, words, checked=False)  # the loss below is
        loss = F.cross_entropy(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.loss += loss.item()
        self.right += int((logits.argmax(-1) == target).sum())
        if not math.isfinite(self.loss):
            raise PatchSAEError(
                f"the loss is not finite at step {self.step}; use a smaller lr than {config.lr}, or "
                f"precision=float32 (the last checkpoint stays in '{self.stage.path}')."
            )

    def _row(self) -> None:
        epoch = self.step // self.per_epoch
        self.metrics.append(
            {
                "epoch": epoch,
                "step": self.step,
                "lr": self.config.rate(epoch - 1),
                "loss": self.loss / self.per_epoch,
                "accuracy": self.right / (self.per_epoch * self.config.batch_size),
            }
        )
        self.loss, self.right = 0.0, 0

    def _save(self) -> None:
        tensors = {f"prompts.{name}": value for name, value in self.parameters.items()}
        for name, value in self.parameters.items() if self.config.momentum else ():
            tensors[f"momentum.{name}"] = self.optimizer.state[value]["momentum_buffer"]
        run = {key: getattr(self, key) for key in ("step", "loss", "right", "metrics", "seconds")}
        run["inputs"] = digest(self.stage.inputs)
        save_tensors(self.checkpoint, tensors, run)

    @torch.no_grad()
    def _restore(self) -> None:
        try:
            run, tensors = open_checkpoint(self.checkpoint, self.stage)
            for name, value in self.parameters.items():
                value.copy_(tensors[f"prompts.{name}"])
                if self.config.momentum:
                    momentum = tensors[f"momentum.{name}"].to(value.device)
                    self.optimizer.state[value]["momentum_buffer"] = momentum
            self.step, self.loss, self.right = run["step"], run["loss"], run["right"]
            self.metrics, self.seconds = run["metrics"], run["seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise PatchSAEError(
                f"'{self.checkpoint}' is no checkpoint of this run ({reason}); delete it to start over."
            ) from error
