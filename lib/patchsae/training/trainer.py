"""Train a sparse autoencoder on the tokens of a backbone, streamed from an image set.

A run can be killed at any moment: what it has learned is in a checkpoint that was written whole or not at
all, and the stream goes on at any batch, so it ends with the weights and metrics of a run that was not.
Under torchrun every process trains on its part of each batch and all take the same steps.
"""

from __future__ import annotations

import csv
import math
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.images.sets import ImageSet
from patchsae.runs.cadence import Cadence
from patchsae.runs.checks import check_weights
from patchsae.runs.disk import remove
from patchsae.runs.errors import PatchSAEError, choose
from patchsae.runs.processes import Processes, join
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import Stage, digest, versioned, write_atomic
from patchsae.runs.tensors import load_tensors, save_tensors
from patchsae.sae.model import CONFIG, SAE, WEIGHTS, SAEConfig
from patchsae.sae.step import Execution, Step, Stepper
from patchsae.training.failures import not_finite
from patchsae.training.starts import BiasInit, Start, set_start
from patchsae.training.stream import Position, StreamConfig, TokenBatch, TokenStream

VERSION = 1  # raised when the same inputs give other weights or metrics
CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.csv"
FILES = (CONFIG, WEIGHTS, METRICS)


@dataclass(frozen=True)
class TrainConfig(StreamConfig):
    """How an SAE is trained; the defaults are the paper's (App. A, facts.md §0)."""

    lr: float = 4e-4
    """Adam's step size after warm-up."""
    warmup_steps: int = 500
    """Steps of linear warm-up; constant afterwards, up to `decay_from`."""
    decay_from: float = 1.0
    """Share of the run after which the step size falls linearly to 0; 1 keeps it constant."""
    l1_warmup: float = 0.0
    """Share of the run in which the weight of the L1 penalty rises linearly from 0."""
    start: Start = Start.RANDOM
    """Start of the rows of encoder and decoder."""
    b_dec_init: BiasInit = BiasInit.GEOMETRIC_MEDIAN
    """Start of the decoder bias."""
    bias_tokens: int = 50_000
    """Least number of tokens (all of the run, if fewer) whose median or mean the bias starts at, and that
    `start` may draw rows from."""
    bias_images: int = 128
    """Images whose median the bias starts at, for geometric_median_images."""
    dead_window: int = 64
    """A latent is dead after this many steps without firing."""
    execution: Execution = Execution.AUTO
    """How a step is computed."""
    log_every: int = 20
    """Steps between two rows of the metrics table."""
    tensorboard: bool = False
    """Whether the rows also go to TensorBoard. Does not change results."""
    checkpoint_share: float = 0.03
    """Share of the time that may go into checkpoints, which sets how often there is one. Does not change
    results."""

    def __post_init__(self):
        super().__post_init__()
        choose(self, "b_dec_init", BiasInit)
        choose(self, "execution", Execution)
        choose(self, "start", Start)
        for name in ("decay_from", "l1_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be a share from 0 to 1.")
        counts = ("bias_tokens", "bias_images", "dead_window", "log_every", "checkpoint_share", "lr")
        for name in counts:
            if not getattr(self, name) > 0:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be positive.")

    def inputs(self) -> dict[str, object]:
        """Return what decides the result, for the stage's hash."""
        idle = ("workers", "cache", "tensorboard", "checkpoint_share")
        values = {key: value for key, value in asdict(self).items() if key not in idle}
        # left out as long as they do nothing: results made before these fields came keep their names
        for name in ("decay_from", "l1_warmup", "start"):
            if values[name] == getattr(TrainConfig, name):
                del values[name]
        # where a cache lies is all one, but tokens from one are rounded to float16
        return values | {"cached": bool(self.cache)}


class Trained(NamedTuple):
    """A finished run."""

    sae: SAE
    metrics: list[dict[str, float]]
    folder: Path
    shipped: str = ""
    """Name of the artefact it was loaded from; '' if it was trained here."""


def training_inputs(
    images: ImageSet, backbone: Backbone, sae_config: SAEConfig, config: TrainConfig
) -> dict[str, object]:
    """Return everything that decides what a run learns, the same on every machine."""
    return {
        "images": images.fingerprint(),
        "backbone": backbone.fingerprint(),
        "sae": asdict(sae_config),
        "train": config.inputs(),
    }


def training_digest(
    images: ImageSet, backbone: Backbone, sae_config: SAEConfig, config: TrainConfig
) -> str:
    """Return the hash of `training_inputs` and of this code's version, by which a shipped SAE is found."""
    return digest(versioned(training_inputs(images, backbone, sae_config, config), VERSION))


def train_sae(
    images: ImageSet,
    backbone: Backbone,
    sae_config: SAEConfig,
    config: TrainConfig,
    root: str | Path,
    progress: bool = True,
) -> Trained:
    """Train an SAE, or return it if `root` holds one made from the same inputs.

    Metrics go to `metrics.csv` and weights to `sae.safetensors` in a folder named by the hash of the
    inputs. A run that was killed at any moment goes on from its last checkpoint and ends with the same
    bits as one that was not. Under torchrun all processes call this with a common `root`; another number
    of them, also when going on, ends the same to 1e-5. A second run of the same inputs waits for the first.

    Raises
    ------
    PatchSAEError : the SAE's width is not the backbone's; the checkpoint is damaged or foreign; the loss is
        not finite; as `TokenStream`.
    """
    if sae_config.d_in != backbone.d_model:
        raise PatchSAEError(
            f"d_in={sae_config.d_in} of the SAE is not the width {backbone.d_model} of {backbone.name}; "
            f"set d_in={backbone.d_model}."
        )
    inputs = training_inputs(images, backbone, sae_config, config)
    stage, processes = Stage.open(root, "sae", inputs, version=VERSION), join(backbone.device)
    stage.once(
        lambda: _Run(images, backbone, sae_config, config, stage, processes, progress).go(), processes
    )
    if processes.first:
        remove(stage.path / CHECKPOINT)
    return Trained(SAE.load(stage.path, backbone.device), read_metrics(stage.path), stage.path)


class _Run:
    """One training run: the state that a checkpoint holds, and the loop over batches."""

    def __init__(
        self,
        images: ImageSet,
        backbone: Backbone,
        sae_config: SAEConfig,
        config: TrainConfig,
        stage: Stage,
        processes: Processes,
        progress: bool,
    ):
        self.config, self.processes, self.stage, self.progress = (
            config,
            processes,
            stage,
            progress and processes.first,
        )
        self.stream = TokenStream(images, backbone, config, processes, self.progress)
        self.sae = SAE(sae_config, seed=config.seed).to(backbone.device)
        self.silent = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=backbone.device)
        self.step = self.tokens_seen = 0
        self.position = Position()
        self.metrics: list[dict[str, float]] = []
        self.checkpoint = stage.path / CHECKPOINT

    @property
    def images_seen(self) -> int:
        """Images' worth of tokens: a batch holds tokens of many images."""
        return self.tokens_seen // self.stream.activations.tokens

    @torch.enable_grad()  # whoever first needs an SAE may be in the middle of measuring
    def go(self) -> None:
        if self.processes.agree(self.checkpoint.exists()):
            self._restore()
        else:
            self.stream.check_readable()
            set_start(self.sae, self.stream, self.config, processes=self.processes)
            self.stepper = self._stepper()
        self._learn()
        if self.images_seen != self.config.images:
            raise PatchSAEError(
                f"the run in {self.stage.path} saw {self.images_seen} of {self.config.images} images, so "
                "it is not finished; delete that folder, then run again."
            )
        if self.processes.first:
            self._check_weights()
            self.sae.save(self.stage.path)
            write_metrics(self.stage.path, self.metrics)
            self.stage.finish(
                *FILES, seed=self.config.seed, images=self.config.images, tokens=self.tokens_seen
            )

    def _stepper(self) -> Stepper:
        return Stepper(self.sae, self.config.execution, self.processes.group)

    def _schedule(self) -> tuple[float, float]:
        """Return the next step's size, and its share of the L1 weight."""
        config, tokens = self.config, self.stream.activations.tokens
        passed = self.tokens_seen / (config.images * tokens)
        rate = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        if passed > config.decay_from:
            rate *= (1 - passed) / (1 - config.decay_from)
        return rate, min(1.0, passed / config.l1_warmup) if config.l1_warmup else 1.0

    def _learn(self) -> None:
        config = self.config
        log = _Log(config, self.stage.path, self.processes, self.step, self.tokens_seen)
        bar = progress_bar(
            total=config.images,
            initial=self.images_seen,
            desc="training the SAE",
            unit="image",
            mininterval=1.0,
            shown=self.progress,
        )
        cadence = Cadence(config.checkpoint_share)
        with closing(self.stream.batches(self.position)) as batches, closing(log), bar:
            for batch in batches:
                rate, share = self._schedule()
                self.sae.l1 = share * self.sae.config.l1
                dead = self.silent > config.dead_window
                step = self.stepper.step(batch.x, rate, dead, batch.is_cls)
                self.silent = torch.where(step.fired, 0, self.silent + 1)
                self.step, self.tokens_seen = self.step + 1, self.tokens_seen + batch.tokens
                self._check(step, batch)
                self.position = batch.position
                bar.update(self.images_seen - bar.n)
                if self.step % config.log_every == 0 or self.images_seen == config.images:
                    counts = {"step": self.step, "images": self.images_seen, "tokens": self.tokens_seen}
                    row = log.row(counts, batch, step, dead, rate)
                    self.metrics.append(row)
                    bar.set_postfix({k: f"{row[k]:.3g}" for k in ("fvu", "l0", "dead_share")})
                if self.processes.first:
                    cadence.save(self._save)

    def _check(self, step: Step, batch: TokenBatch) -> None:
        """Refuse a step whose loss is not finite; `position` is still that of its batch."""
        if not math.isfinite(step.reconstruction + step.l1_loss + step.ghost):
            names = [self.stream.images.key(i) for i in self.stream.images_at(self.position)]
            settings = {"lr": self.config.lr, "l1": self.sae.config.l1, "ghost": self.sae.config.ghost}
            raise not_finite(step, self.step, batch.x, names, settings, self.stage.path)

    def _check_weights(self) -> None:
        # a step may make them infinite whose own loss was finite: nothing of that is kept
        check_weights(f"after step {self.step} the SAE", self.sae.state_dict())

    def _save(self) -> None:
        self._check_weights()
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        tensors |= {f"stepper.{name}": value for name, value in self.stepper.state().items()}
        tensors["silent"] = self.silent
        run = {
            "inputs": digest(self.stage.inputs),
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "position": self.position,
            "metrics": self.metrics,
        }
        save_tensors(self.checkpoint, tensors, run)
        write_metrics(self.stage.path, self.metrics)

    def _restore(self) -> None:
        try:
            run, tensors = open_checkpoint(self.checkpoint, self.stage)
            # the weights come first: the stepper may keep them in a form of its own
            self.sae.load_state_dict(_part(tensors, "sae."))
            self.stepper = self._stepper()
            self.stepper.restore(_part(tensors, "stepper."))
            self.silent.copy_(tensors["silent"])
            self.step, self.tokens_seen, self.metrics = run["step"], run["tokens_seen"], run["metrics"]
            self.position = Position(*run["position"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise PatchSAEError(
                f"'{self.checkpoint}' is no checkpoint of this run ({reason}); delete it to start over."
            ) from error


def open_checkpoint(path: Path, stage: Stage) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what a run of this stage saved; ValueError, among others, if it is damaged or of another run."""
    tensors, run = load_tensors(path)
    if run["inputs"] != digest(stage.inputs):
        raise ValueError("it is of another run")
    return run, tensors


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class _Log:
    """Measure the steps that are logged: rows of the metrics table, and TensorBoard if asked."""

    def __init__(self, config: TrainConfig, folder: Path, processes: Processes, step: int, tokens: int):
        self.processes, self.tokens, self.time = processes, tokens, time.perf_counter()
        self.writer = None
        if config.tensorboard and processes.first:
            # what a killed run wrote after its checkpoint is purged
            self.writer = _tensorboard()(folder / "tensorboard", purge_step=step + 1)

    def row(
        self, counts: dict[str, int], batch: TokenBatch, step: Step, dead: Tensor, lr: float
    ) -> dict[str, float]:
        """Return one row; every process takes part, `counts` are step, images and tokens seen."""
        x, gap = batch.x, (step.output - batch.x).square()
        # the unit of Table 2 whatever was trained on: unweighted, (x̂ - x)² / ‖x‖
        mse = gap.mean(-1) / x.norm(dim=-1).clamp(min=1e-8)
        cosine = torch.cosine_similarity(x, step.output, dim=-1)
        sums = [value.double().sum() for value in (mse, cosine, gap, x.double().square())]
        sums = self.processes.sum(torch.cat([torch.stack(sums), x.double().sum(0)]))
        mse, cosine, error, square = sums[:4].tolist()
        spread = square - sums[4:].square().sum().item() / batch.tokens
        now = time.perf_counter()
        row = counts | {
            "mse": mse / batch.tokens,
            "fvu": error / spread if spread > 0 else math.nan,
            "cosine": cosine / batch.tokens,
            "l0": step.l0,
            "l1_norm": step.l1_norm,
            "ghost": step.ghost,
            "dead_share": dead.float().mean().item(),
            "lr": lr,
            "tokens_per_second": (counts["tokens"] - self.tokens) / (now - self.time),
        }
        self.tokens, self.time = counts["tokens"], now
        if self.writer:
            for key, value in row.items():
                self.writer.add_scalar(key, value, counts["step"])
        return row

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def _tensorboard() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise PatchSAEError(
            "tensorboard=True needs the package tensorboard; "
            "run 'pip install tensorboard', or leave tensorboard=False."
        ) from error
    return SummaryWriter


def write_metrics(folder: Path, rows: list[dict[str, float]]) -> None:
    """Write the metrics table, one row per logged step."""

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["step"])
            writer.writeheader()
            writer.writerows(rows)

    write_atomic(folder / METRICS, write)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read the metrics table written by a run."""
    with open(folder / METRICS, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
