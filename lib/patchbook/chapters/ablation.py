"""Table 2: what each choice in training an autoencoder does, its rows run alike and several at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from patchbook.scales import Scale, scale
from patchbook.shipped import find_or_train, shipped_name
from patchsae.clip.backbone import Backbone, zero_shot_weights
from patchsae.images.sets import ImageSet
from patchsae.masking.through import (
    contrastive_loss,
    reconstruction,
    through_sae,
    zero_shot,
    zeroed,
)
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import share_of_gain
from patchsae.runs.jobs import workers
from patchsae.runs.stage import Stage, write_json
from patchsae.sae.model import SAEConfig
from patchsae.training.activations import Tokens
from patchsae.training.starts import BiasInit
from patchsae.training.token_cache import fill, from_cache, parts_of
from patchsae.training.trainer import TrainConfig, training_digest

VERSION = 3  # raised when the same inputs give another row
RESULT = "row.json"


@dataclass(frozen=True)
class Design:
    """The choices of one row, as the paper prints them; the defaults are its CLS row on L/14."""

    block: int = 11
    """Block whose output is decomposed."""
    tokens: Tokens = Tokens.CLS
    """Tokens the autoencoder is trained and measured on."""
    architecture: str = "L/14"
    """Vision transformer: 'B/16' or 'L/14'."""
    l1: float = 8e-5
    """λ, at the paper's scale."""
    expansion: float = 64
    """Latents per dimension, at the paper's scale."""
    ghost: bool = True
    """Whether dead latents get ghost gradients."""
    b_dec_init: BiasInit = BiasInit.GEOMETRIC_MEDIAN
    """Start of the decoder bias."""
    replicate: int = 0
    """Added to the seed: the same choices again, to see what the seed alone does."""


DEFAULT = Design()
ALL_TOKENS = Design(tokens=Tokens.ALL, architecture="B/16")
# Every distinct row of Table 2 in its order. Fry's own run differs from the next row in who ran it.
DESIGNS = {
    "baseline (Fry)": replace(DEFAULT, replicate=1),
    "CLS, default": DEFAULT,
    "λ = 0": replace(DEFAULT, l1=0.0),
    "λ × 10": replace(DEFAULT, l1=8e-4),
    "expansion / 2": replace(DEFAULT, expansion=32),
    "expansion × 2": replace(DEFAULT, expansion=128),
    "no ghost": replace(DEFAULT, ghost=False),
    "b_dec from mean": replace(DEFAULT, b_dec_init=BiasInit.MEAN),
    "CLS, B/16": replace(DEFAULT, architecture="B/16"),
    "all tokens": ALL_TOKENS,
    "block 8": replace(ALL_TOKENS, block=8),
    "block 5": replace(ALL_TOKENS, block=5),
    "block 2": replace(ALL_TOKENS, block=2),
}


@dataclass(frozen=True)
class Sweep:
    """What the rows have in common."""

    scale: str = "embedded"
    """Scale whose λ and expansion play the part of the paper's 8e-5 and 64."""
    model: str = ""
    """open_clip model or folder that plays B/16; '' takes the scale's."""
    pretrained: str = ""
    """open_clip tag or weights file of it."""
    large_model: str = ""
    """Model that plays L/14; '' takes the one that plays B/16."""
    large_pretrained: str = ""
    """open_clip tag or weights file of it."""
    large_block: int = 0
    """Block of that model that plays the printed one; 0 takes the printed one."""
    device: str = "cpu"
    """Where everything runs."""
    expansion: float | None = None
    """Latents per dimension of the default rows; None takes the scale's."""
    l1: float | None = None
    """λ of the default rows; None takes the scale's."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How rows on all tokens are trained; with a `cache`, the measuring reads one too."""
    cls_train: TrainConfig = field(default_factory=TrainConfig)
    """How rows on the CLS token are trained."""
    templates: tuple[str, ...] = ("a picture of a {}",)
    """Zero-shot prompts."""
    contrast_images: int = 1024
    """Images of a contrastive batch (at most all test images); Table 2 fits 1024."""
    draws: int = 10
    """Contrastive batches."""
    seed: int = 0
    """Seed of the measuring; that of training is in `train` and `cls_train`."""

    def backbone(self, design: Design) -> Backbone:
        """Load the model that plays a row's architecture, cut after the row's block; once per process."""
        block = self.large_block if self._is_large(design) and self.large_block else design.block
        return self._model(design).at_block(block)

    def text(self, design: Design, classnames: Sequence[str]) -> Tensor:
        """Return the text vectors [C, e] of that model; once per process."""
        return _text(self._model(design), tuple(classnames), self.templates)

    def configs(self, design: Design) -> tuple[SAEConfig, TrainConfig]:
        """Return a row's settings here: λ and expansion differ from the default by the paper's factors."""
        setup = scale(self.scale)
        l1 = setup.l1 if self.l1 is None else self.l1
        expansion = (self.expansion or setup.expansion) * (design.expansion / DEFAULT.expansion)
        sae = SAEConfig(
            d_in=self.backbone(design).d_model,
            # a whole number is written as one, so that a row of the scale's own settings is the scale's SAE
            expansion=int(expansion) if expansion.is_integer() else expansion,
            l1=l1 * (design.l1 / DEFAULT.l1),
            ghost=design.ghost,
        )
        train = self.cls_train if design.tokens is Tokens.CLS else self.train
        changes = {"tokens": design.tokens, "b_dec_init": design.b_dec_init}
        return sae, replace(train, seed=train.seed + design.replicate, **changes)

    def _is_large(self, design: Design) -> bool:
        return design.architecture == "L/14" and bool(self.large_model)

    def _model(self, design: Design) -> Backbone:
        large = self._is_large(design)
        names = (self.large_model, self.large_pretrained) if large else (self.model, self.pretrained)
        return _model(self.scale, *names, self.device)


@dataclass(frozen=True)
class Budget:
    """How many images the rows see; the defaults are the book's, and artefacts/sae has their SAEs."""

    row_images: int | None = None
    """Images each row on all tokens sees; None takes the scale's own run."""
    cls_images: int = 2_000_000
    """Images each row on the CLS token sees, counted with repetition; 0 takes as many as the other rows."""
    different_images: int | None = None
    """Training images there are, their tokens cached; None: the scale's, which may be all, uncached."""
    cls_different_images: int = 12_288
    """The same for rows on the CLS token, where there is a number for the others."""

    def sets(self, setup: Scale, train: ImageSet, seed: int) -> dict[Tokens, ImageSet]:
        """Return the images that rows on each kind of token are trained on."""
        few = self.different_images or setup.different_images
        if not few:
            return {Tokens.CLS: train, Tokens.ALL: train}
        many = self.cls_different_images
        # without a number of its own the scale draws its images once, for all seeds
        all_seed = seed if self.different_images else 0
        return {Tokens.CLS: _few(train, many, seed), Tokens.ALL: _few(train, few, all_seed)}

    def runs(self, setup: Scale, root: str | Path, seed: int) -> dict[str, TrainConfig]:
        """Return a Sweep's `train` and `cls_train`: the scale's run, or one shortened alike for all."""
        cached = self.different_images or setup.different_images
        train = replace(setup.train, seed=seed, cache=str(root) if cached else "")
        if self.row_images:
            train = replace(train, images=self.row_images, token_batch=1024, warmup_steps=20, log_every=10)
            # an image has one CLS token, so that such rows see more images and fewer tokens a step
            return {"train": train, "cls_train": replace(train, images=self.cls_images, token_batch=64)}
        # as many tokens in a step as the released code's batch has images
        few = {"images": self.cls_images} if self.cls_images else {"token_batch": 128}
        return {"train": train, "cls_train": replace(train, **few)}


def _few(images: ImageSet, n: int, seed: int) -> ImageSet:
    return images.sample(n, seed) if n < len(images) else images


class Row(NamedTuple):
    """One row of Table 2, measured on the row's tokens of test images."""

    folder: str
    """Name of the SAE's folder."""
    latents: int
    l1: float
    """λ in this run."""
    expansion: float
    mse: float
    fvu: float
    l1_norm: float
    """Mean sum of latents per token, not multiplied by λ."""
    l0: float
    silent: float
    """Share of latents that fire on no token of the test images."""
    dead: float
    """Share of latents that were dead (silent for `dead_window` steps) at the end of training."""
    cl_sae: float
    """Contrastive loss with the CLS token reconstructed, whatever tokens the row is trained on."""
    cl_original: float
    cl_zeroed: float
    accuracy: float
    """Zero-shot top-1 of the model itself, as a share."""
    accuracy_sae: float
    """The same with the row's tokens reconstructed."""
    accuracy_zeroed: float
    recovered: float
    """(accuracy_sae - accuracy_zeroed) / (accuracy - accuracy_zeroed), not clipped."""
    recovered_low: float
    """95 % bootstrap interval over images."""
    recovered_high: float
    seconds: float
    """Training and measuring."""


def run_rows(
    designs: Mapping[str, Design],
    sweep: Sweep,
    train: Mapping[Tokens, ImageSet],
    test: ImageSet,
    root: str | Path,
    jobs: int = 1,
    progress: bool = True,
) -> dict[str, Row]:
    """Train and measure every row, or read those that `root` holds; equal rows are run once.

    Parameters
    ----------
    train : images that rows on each kind of token are trained on
    jobs : processes that share the rows; 1 runs them here (see `jobs.workers`)

    Raises
    ------
    PatchSAEError : a contrastive batch has fewer than two images; as `workers` and `train_sae`.
    """
    if min(sweep.contrast_images, len(test)) < 2:
        raise PatchSAEError(
            f"contrast_images={sweep.contrast_images} of {len(test)} test images make no batch; take more."
        )
    stages = {
        name: _stage(design, sweep, train[design.tokens], test, root) for name, design in designs.items()
    }
    # equal rows have one stage, which is run once
    todo = {stages[name].path: design for name, design in designs.items() if not stages[name].done}
    if todo:
        with workers(min(jobs, len(todo)), progress) as run:
            parts = list(_parts(todo.values(), sweep, train, test))
            # number 0 last: it marks a cache as finished
            run("caching tokens", _fill, [part for part in parts if part.number])
            run("finishing the caches", _fill, [part for part in parts if not part.number])
            # the longest first, so that no process is left with them at the end
            order = sorted(todo.values(), key=lambda design: -_cost(design))
            tasks = [(design, sweep, train[design.tokens], test, root) for design in order]
            run("training and measuring", _run, tasks)
    return {name: _read(stage) for name, stage in stages.items()}


@lru_cache(maxsize=2)
def _model(name: str, model: str, pretrained: str, device: str) -> Backbone:
    return scale(name).backbone(model, pretrained, block=1, device=device)


@lru_cache(maxsize=2)
def _text(model: Backbone, classnames: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    return zero_shot_weights(model, classnames, templates)


def _stage(design: Design, sweep: Sweep, train: ImageSet, test: ImageSet, root: str | Path) -> Stage:
    sae, config = sweep.configs(design)
    inputs = {
        "train_images": train.fingerprint(),
        "test_images": test.fingerprint(),
        "backbone": sweep.backbone(design).fingerprint(),
        "sae": asdict(sae),
        "train": config.inputs(),
        "templates": sweep.templates,
        "contrast": (min(sweep.contrast_images, len(test)), sweep.draws),
        "seed": sweep.seed,
    }
    return Stage.open(root, "ablation", inputs, version=VERSION)


class _Part(NamedTuple):
    """Some images whose tokens are to be cached, and what of them."""

    sweep: Sweep
    kept: list[tuple[Design, Tokens]]
    images: ImageSet
    number: int
    parts: int


def _parts(designs: Iterable[Design], sweep: Sweep, train: ImageSet, test: ImageSet) -> Iterator[_Part]:
    """Name the parts of every cache that the rows read, so that they are made once and no row waits."""
    if not sweep.train.cache:
        return
    passes: dict[tuple, tuple[ImageSet, dict]] = {}
    for design in designs:
        backbone = sweep.backbone(design)
        model = backbone.at_block(1).fingerprint()
        asked, learned_on = [(Tokens.ALL, test)], train[design.tokens]
        # who is shipped is not trained here, and needs no tokens of training images
        if not shipped_name(training_digest(learned_on, backbone, *sweep.configs(design))):
            asked.append((design.tokens, learned_on))
        for tokens, images in asked:
            _, kept = passes.setdefault((model, images.fingerprint()), (images, {}))
            kept.setdefault((backbone.block, tokens), (design, tokens))
    for images, kept in passes.values():
        for number in range(parts_of(images)):
            yield _Part(sweep, list(kept.values()), images, number, parts_of(images))


def _cost(design: Design) -> float:
    return (design.tokens is not Tokens.CLS) * 100 + design.block


def _fill(
    sweep: Sweep, kept: Sequence[tuple[Design, Tokens]], images: ImageSet, number: int, parts: int
) -> None:
    wanted = [(sweep.backbone(design), tokens) for design, tokens in kept]
    fill(images, wanted, sweep.train.cache, number, parts)


def _run(design: Design, sweep: Sweep, train: ImageSet, test: ImageSet, root: str | Path) -> None:
    stage = _stage(design, sweep, train, test, root)

    def make() -> None:
        row = _measured(design, sweep, train, test, root)
        write_json(stage.path / RESULT, row._asdict())
        stage.finish(RESULT, seed=sweep.seed)

    stage.once(make)


def _measured(design: Design, sweep: Sweep, train: ImageSet, test: ImageSet, root: str | Path) -> Row:
    began = time.perf_counter()
    backbone, (config, training) = sweep.backbone(design), sweep.configs(design)
    trained = find_or_train(train, backbone, config, training, root, progress=False)
    sae = trained.sae
    images, past = from_cache(test, backbone, sweep.train.cache)
    rebuilt = reconstruction(sae, past, images, design.tokens)
    text = sweep.text(design, test.classnames)
    edits = (None, through_sae(sae, past, design.tokens), zeroed(past, design.tokens))
    said = zero_shot(past, images, text, edits, progress=None).predictions
    right = said == test.labels
    original, through, floor = right
    kept = share_of_gain(floor, original, through, sweep.seed, draws=1000)
    batch = min(sweep.contrast_images, len(test))
    losses = contrastive_loss(
        sae, past, images, batch, seed=sweep.seed, draws=sweep.draws, progress=None
    ).drawn
    accuracy = dict(zip(("accuracy", "accuracy_sae", "accuracy_zeroed"), right.mean(1), strict=True))
    return Row(
        folder=trained.folder.name,
        latents=sae.d_sae,
        l1=config.l1,
        expansion=config.expansion,
        **{name: getattr(rebuilt, name) for name in ("mse", "fvu", "l1_norm", "l0")},
        silent=rebuilt.dead_share,
        dead=trained.metrics[-1]["dead_share"],
        cl_sae=losses.sae.mean,
        cl_original=losses.original.mean,
        cl_zeroed=losses.zeroed.mean,
        **accuracy,
        recovered=kept.value,
        recovered_low=kept.low,
        recovered_high=kept.high,
        seconds=time.perf_counter() - began,
    )


def _read(stage: Stage) -> Row:
    try:
        values = json.loads((stage.path / RESULT).read_text("utf-8"))
        # a NaN is written by its name
        numbers = {name: float(v) if v in ("nan", "inf", "-inf") else v for name, v in values.items()}
        return Row(**numbers)
    except (OSError, ValueError, TypeError) as error:
        raise PatchSAEError(
            f"'{stage.path / RESULT}' is damaged ({error}); delete the folder, and the row is run again."
        ) from error
