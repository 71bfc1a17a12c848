"""Train a sparse autoencoder on the tokens of a backbone, streamed from an image set.

The stream is cut into chunks of images. The tokens of one chunk are mixed across its images and handed
out in batches, so a chunk is a function of (seed, chunk number) alone: memory is bounded by one chunk,
and a run that was stopped goes on from the last checkpoint with the very batches it would have seen.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .backbone import Backbone
from .errors import PatchSAEError
from .images import ImageSet
from .progress import progress_bar
from .sae import SAE, SAEConfig, geometric_median
from .stage import Stage, write_atomic

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.csv"


class Tokens(StrEnum):
    """Which tokens the autoencoder sees (Fig. 8)."""

    ALL = "all"
    CLS = "cls"
    PATCHES = "patches"


class BiasInit(StrEnum):
    """What b_dec starts at (facts.md §4.3)."""

    GEOMETRIC_MEDIAN = "geometric_median"  # of tokens
    MEAN = "mean"
    ZEROS = "zeros"


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained; the defaults are the paper's (App. A, facts.md §0)."""

    images: int = 2_621_440
    """Images seen, counted with repetition."""
    tokens: Tokens = Tokens.ALL
    """Which tokens of an image are used."""
    chunk_images: int = 1024
    """Images whose tokens are mixed with each other."""
    image_batch: int = 64
    """Images per pass of the backbone."""
    token_batch: int = 4096
    """Tokens per optimiser step."""
    lr: float = 4e-4
    """Adam's step size after warm-up."""
    warmup_steps: int = 500
    """Steps of linear warm-up; constant afterwards."""
    b_dec_init: BiasInit = BiasInit.GEOMETRIC_MEDIAN
    """Start of the decoder bias."""
    bias_tokens: int = 50_000
    """Tokens that the start of the bias is computed from."""
    dead_window: int = 64
    """A latent is dead after this many steps without firing."""
    seed: int = 0
    """Seed of the weights, the order of images and the mixing of tokens."""
    log_every: int = 20
    """Steps between two rows of the metrics table."""
    checkpoint_chunks: int = 4
    """Chunks between two checkpoints."""

    def __post_init__(self):
        for name, kind in (("tokens", Tokens), ("b_dec_init", BiasInit)):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                raise PatchSAEError(
                    f"{name}='{getattr(self, name)}' is unknown; choose one of {', '.join(kind)}."
                ) from None
        counts = ("images", "chunk_images", "image_batch", "token_batch", "dead_window", "log_every")
        for name in (*counts, "checkpoint_chunks", "bias_tokens", "lr"):
            if not getattr(self, name) > 0:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be positive.")


class TokenChunk(NamedTuple):
    """The tokens of some images, mixed across them."""

    x: Tensor  # [N, d]
    is_cls: Tensor  # [N] bool
    images: int


class Trained(NamedTuple):
    """A finished run."""

    sae: SAE
    metrics: list[dict[str, float]]
    folder: Path


def token_columns(backbone: Backbone, tokens: Tokens) -> np.ndarray:
    """Return the positions of the tokens that are used; prompt tokens never are (facts.md §1.4)."""
    kind = backbone.token_kind
    wanted = {
        Tokens.ALL: (kind == "cls") | (kind == "patch"),
        Tokens.CLS: kind == "cls",
        Tokens.PATCHES: kind == "patch",
    }
    columns = np.flatnonzero(wanted[Tokens(tokens)])
    if not len(columns):
        raise PatchSAEError(f"tokens='{tokens}' leaves none: {backbone.name} has no such token.")
    return columns


def image_order(length: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Return which images come as number start … stop-1: every epoch in an order of its own."""
    numbers = np.arange(start, stop)
    order = np.empty(len(numbers), np.int64)
    for epoch in np.unique(numbers // length):
        here = numbers // length == epoch
        shuffled = np.random.default_rng([seed, int(epoch)]).permutation(length)
        order[here] = shuffled[numbers[here] % length]
    return order


@torch.no_grad()
def token_chunk(images: ImageSet, backbone: Backbone, config: TrainConfig, chunk: int) -> TokenChunk:
    """Compute chunk number `chunk` of the stream: a function of the seed and the number alone."""
    start = chunk * config.chunk_images
    stop = min(start + config.chunk_images, config.images)
    columns = torch.from_numpy(token_columns(backbone, config.tokens)).to(backbone.device)
    order = image_order(len(images), config.seed, start, stop)
    rows = [
        backbone.residual(backbone.normalize(batch.images))[:, columns].float()
        for batch in images.batches(config.image_batch, order)
    ]
    x = torch.cat(rows)  # [I, T, d]
    is_cls = torch.from_numpy(backbone.token_kind == "cls").to(x.device)[columns]
    is_cls = is_cls.expand(len(x), -1).flatten()
    x = x.flatten(0, 1)
    if not torch.isfinite(x).all():
        raise PatchSAEError(
            f"the residual stream of {backbone.name} after block {backbone.block} has NaN or "
            f"infinite values on '{images.name}'; use dtype float32, or check the weights."
        )
    draw = torch.Generator().manual_seed(config.seed * 1_000_003 + chunk)
    mixed = torch.randperm(len(x), generator=draw).to(x.device)
    return TokenChunk(x[mixed], is_cls[mixed], stop - start)


def initial_bias(x: Tensor, kind: BiasInit) -> Tensor:
    """Compute the start of b_dec from tokens [N, d]."""
    if kind is BiasInit.ZEROS:
        return x.new_zeros(x.shape[1])
    return x.mean(0) if kind is BiasInit.MEAN else geometric_median(x)


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
    inputs. A run that was stopped at any moment goes on from its last checkpoint and ends with the same
    weights as one that was not.
    """
    if len(images) == 0:
        raise PatchSAEError(f"image set '{images.name}' is empty; nothing to train on.")
    inputs = {
        "images": images.fingerprint(),
        "backbone": backbone.fingerprint(),
        "sae": asdict(sae_config),
        # how often something is written does not change what is learned
        "train": asdict(replace(config, checkpoint_chunks=1)),
    }
    stage = Stage.open(root, "sae", inputs)
    if not stage.done:
        run = _Run(images, backbone, sae_config, config, stage.path)
        run.go(progress)
        run.sae.save(stage.path)
        (stage.path / CHECKPOINT).unlink(missing_ok=True)
        stage.finish(seed=config.seed, images=run.images_seen, tokens=run.tokens_seen)
    return Trained(SAE.load(stage.path, backbone.device), read_metrics(stage.path), stage.path)


class _Run:
    """One training run: the state that a checkpoint holds, and the loop over chunks."""

    def __init__(self, images, backbone, sae_config: SAEConfig, config: TrainConfig, folder: Path):
        self.images, self.backbone, self.config, self.folder = images, backbone, config, folder
        self.sae = SAE(sae_config, seed=config.seed).to(backbone.device)
        self.adam = torch.optim.Adam(
            self.sae.parameters(), lr=config.lr, fused=backbone.device.type in ("cpu", "cuda")
        )
        self.silent = torch.zeros(self.sae.d_sae, dtype=torch.int64, device=backbone.device)
        self.step = self.chunk = self.images_seen = self.tokens_seen = 0
        self.metrics: list[dict[str, float]] = []
        self.chunks = math.ceil(config.images / config.chunk_images)

    def go(self, progress: bool) -> None:
        if (self.folder / CHECKPOINT).exists():
            self._restore()
        bar = progress_bar(
            total=self.config.images,
            initial=self.images_seen,
            desc="training the SAE",
            unit="image",
            mininterval=1.0,
            shown=progress,
        )
        for number in range(self.chunk, self.chunks):
            chunk = token_chunk(self.images, self.backbone, self.config, number)
            if number == 0:
                sample = chunk.x[: self.config.bias_tokens]
                self.sae.b_dec.data = initial_bias(sample, self.config.b_dec_init)
            self._learn(chunk, last=number + 1 == self.chunks)
            self.chunk, self.images_seen = number + 1, self.images_seen + chunk.images
            bar.update(chunk.images)
            if self.metrics:
                last = self.metrics[-1]
                bar.set_postfix({k: f"{last[k]:.3g}" for k in ("fvu", "l0", "dead_share")})
            if self.chunk % self.config.checkpoint_chunks == 0 or self.chunk == self.chunks:
                self._save()
        bar.close()

    def _learn(self, chunk: TokenChunk, last: bool) -> None:
        config, started, done = self.config, time.perf_counter(), 0
        for x, is_cls in self._batches(chunk):
            rate = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup_steps))
            for group in self.adam.param_groups:
                group["lr"] = rate
            dead = self.silent > config.dead_window
            out = self.sae.losses(x, dead, is_cls)
            out.total.backward()
            self.sae.project_decoder_gradient()
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)
            self.sae.normalise_decoder()
            fired = (out.latents > 0).any(0)
            self.silent = torch.where(fired, 0, self.silent + 1)
            self.step, self.tokens_seen, done = self.step + 1, self.tokens_seen + len(x), done + len(x)
            if self.step % config.log_every == 0 or (last and done == len(chunk.x)):
                speed = done / (time.perf_counter() - started)
                self.metrics.append(self._row(x, out, dead, rate, speed))

    def _batches(self, chunk: TokenChunk) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.token_batch
        for start in range(0, len(chunk.x), size):
            yield chunk.x[start : start + size], chunk.is_cls[start : start + size]

    @torch.no_grad()
    def _row(self, x: Tensor, out, dead: Tensor, rate: float, speed: float) -> dict[str, float]:
        spread = (x - x.mean(0)).square().sum()
        row = {
            "step": self.step,
            "images": self.images_seen,
            "tokens": self.tokens_seen,
            "mse": out.reconstruction.item(),
            "l1": out.latents.sum(-1).mean().item(),
            "ghost": out.ghost.item(),
            "fvu": ((x - out.output).square().sum() / spread).item(),
            "cosine": torch.cosine_similarity(x, out.output, dim=-1).mean().item(),
            "l0": (out.latents > 0).sum(-1).float().mean().item(),
            "dead_share": dead.float().mean().item(),
            "lr": rate,
            "tokens_per_second": speed,
        }
        if not math.isfinite(row["mse"]):
            raise PatchSAEError(
                f"the loss is not finite at step {self.step}; use a smaller lr than {self.config.lr}."
            )
        return row

    def _save(self) -> None:
        tensors = {f"sae.{name}": p.detach() for name, p in self.sae.named_parameters()}
        for name, p in self.sae.named_parameters():
            moments = self.adam.state[p]
            tensors |= {f"adam.{name}.{key}": moments[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        tensors["silent"] = self.silent
        tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
        counters = ("step", "chunk", "images_seen", "tokens_seen")
        facts = {key: getattr(self, key) for key in counters}
        facts["metrics"] = self.metrics
        meta = {"run": json.dumps(facts)}
        write_atomic(self.folder / CHECKPOINT, lambda path: save_file(tensors, path, meta))
        write_metrics(self.folder, self.metrics)

    def _restore(self) -> None:
        with safe_open(self.folder / CHECKPOINT, framework="pt") as file:
            facts = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, value in facts.items():
            setattr(self, key, value)
        device = self.backbone.device
        for name, p in self.sae.named_parameters():
            p.data = tensors[f"sae.{name}"].to(device)
            moments = {
                key: tensors[f"adam.{name}.{key}"].to(device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
            self.adam.state[p] = moments
        self.silent = tensors["silent"].to(device)


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
