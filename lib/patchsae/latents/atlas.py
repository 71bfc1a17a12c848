"""Every per-latent statistic of an image set in one streaming pass, resumable and shared by processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.images.loading import Source, read_batches
from patchsae.images.sets import ImageSet
from patchsae.latents.accumulator import EDGES, Accumulator
from patchsae.latents.label_statistics import label_entropy, label_std, reference_entropy, reference_std
from patchsae.runs.cadence import Cadence
from patchsae.runs.checks import check_counts
from patchsae.runs.disk import remove, storing
from patchsae.runs.errors import PatchSAEError, choose
from patchsae.runs.processes import Processes, join
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import Stage
from patchsae.sae.model import SAE
from patchsae.sae.step import latent_lists
from patchsae.training.activations import Tokens, token_columns

ATLAS = "atlas.zarr"
VERSION = 4  # raised when the same inputs give other numbers, or the dataset has another shape
SAVE_SHARE = 0.03  # of the time may go into saving what a killed pass would lose
CHUNK = 4096  # latents per piece on disk


class OnError(StrEnum):
    """What an image that cannot be read does to the pass."""

    SKIP = "skip"  # it is counted and named in the manifest
    RAISE = "raise"  # it ends the pass


@dataclass(frozen=True)
class AtlasConfig:
    """What is counted."""

    tau: float = 0.2
    """Threshold τ of Eq. 4 above which a token counts as active."""
    k: int = 10
    """Reference images kept per latent."""
    top: int = 10
    """Latents kept per image."""
    tokens: Tokens = Tokens.ALL
    """Which tokens of an image are aggregated."""
    include_prompt_tokens: bool = False
    """Whether a MaPLe backbone's prompt tokens are too, as in the released code (facts.md §1.4)."""
    on_error: OnError = OnError.SKIP
    """Whether an unreadable image is left out or ends the pass."""
    empty_classes: bool = False
    """Whether classes without an image are allowed, as in a sample of a set."""

    def __post_init__(self):
        if not self.tau >= 0:
            raise PatchSAEError(f"tau={self.tau} must not be negative; the paper uses 0.2.")
        for name in ("k", "top"):
            if getattr(self, name) < 1:
                raise PatchSAEError(f"{name}={getattr(self, name)} must be at least 1.")
        choose(self, "tokens", Tokens)
        choose(self, "on_error", OnError)


def make_atlas(
    sae: SAE,
    backbone: Backbone,
    images: ImageSet,
    config: AtlasConfig,
    root: str | Path,
    sae_hash: str,
    batch_size: int = 16,
    workers: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Describe every latent on an image set, or read the description if `root` holds it.

    A pass that was killed goes on from what it saved last, and tries again what could not be read. Under
    torchrun all processes call this with a common `root` and share the images; the result is that of one
    process, sums to float64 rounding.

    Parameters
    ----------
    sae_hash : names the SAE in manifest and messages; what makes it another one is its weights' hash
    workers : processes that decode images; 0 decodes here

    Raises
    ------
    PatchSAEError : a batch of no images; k exceeds the images, or those that can be read; a label is
        outside the class names; a class is empty, or nothing of it can be read; an image cannot be read
        and on_error is 'raise'; a token or weight is not finite; a saved part is damaged.
    """
    check_counts(batch_size=batch_size)
    check_counts(0, workers=workers)
    check(images, config)
    inputs = {
        "images": images.fingerprint(),
        "backbone": backbone.fingerprint(),
        "sae": sae_hash,
        "weights": sae.fingerprint(),
        "config": config,
    }
    stage = Stage.open(root, f"atlas-{images.name}", inputs, version=VERSION)
    processes = join(backbone.device)
    stage.once(
        lambda: _Pass(sae, backbone, images, config, stage, processes).go(batch_size, workers, progress),
        processes,
    )
    return xr.open_zarr(stage.path / ATLAS, consolidated=False).load()


def check(images: ImageSet, config: AtlasConfig) -> None:
    """Refuse an image set that cannot be described as asked."""
    classes = len(images.classnames)
    outside = np.flatnonzero((images.labels < 0) | (images.labels >= classes))
    if outside.size:
        raise PatchSAEError(
            f"image {outside[0]} of '{images.name}' has label {images.labels[outside[0]]}, but there are "
            f"{classes} class names; correct its labels or name its classes."
        )
    _check_counts(np.bincount(images.labels, minlength=classes), images, config)


def _check_counts(counts: np.ndarray, images: ImageSet, config: AtlasConfig, unread: str = "") -> None:
    """Refuse too few images per class [C]; `unread` says that others cannot be read, and the remedy."""
    if (there := counts.sum()) < config.k:
        remedy = unread or "; take more images or a smaller k"
        raise PatchSAEError(
            f"k={config.k} references were asked for, but '{images.name}' has {there} images{remedy}."
        )
    empty = np.flatnonzero(counts == 0)
    if empty.size and not config.empty_classes:
        remedy = unread or "; take more images, or set empty_classes=True"
        raise PatchSAEError(
            f"class '{images.classnames[empty[0]]}' (and {empty.size - 1} more) has no image in "
            f"'{images.name}'{remedy}."
        )


class _Readable(Source):
    """Images of a set with those left out that cannot be read."""

    def __init__(self, images: ImageSet, on_error: OnError):
        self.images, self.name, self.on_error = images, images.name, on_error

    def read(self, indices: Sequence[int]) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
        """Return pixels uint8 [n, 3, H, W], the indices they belong to, and what failed why."""
        try:
            return self.images.load(indices).images.cpu(), [int(i) for i in indices], []
        except PatchSAEError:
            if self.on_error is OnError.RAISE:
                raise
        pixels, good, bad = [], [], []
        for index in map(int, indices):
            try:
                pixels.append(self.images.load([index]).images.cpu())
                good.append(index)
            except PatchSAEError as error:
                bad.append((index, str(error)))
        return torch.cat(pixels) if pixels else torch.empty(0), good, bad


class _Pass:
    """One process's part of the pass, and the parts that are on disk."""

    def __init__(
        self,
        sae: SAE,
        backbone: Backbone,
        images: ImageSet,
        config: AtlasConfig,
        stage: Stage,
        processes: Processes,
    ):
        self.sae, self.backbone, self.images, self.config = sae, backbone, images, config
        self.stage, self.processes = stage, processes
        columns = token_columns(backbone, config.tokens)
        if config.include_prompt_tokens:
            columns = np.union1d(columns, np.flatnonzero(backbone.token_kind == "prompt"))
        kinds = backbone.token_kind[columns]
        self.columns = torch.from_numpy(columns).to(backbone.device)
        self.kinds = [kind for kind in ("cls", "patch", "prompt") if kind in kinds]
        self.kind = np.array([self.kinds.index(kind) for kind in kinds], np.int8)
        self.skipped: dict[str, str] = {}

    def go(self, batch_size: int, workers: int, progress: bool) -> None:
        sums, own = self._accumulator(), self._part(self.processes.rank)
        done = self._done()
        if own.exists():
            sums.load(own)
        self.processes.wait()  # nobody writes before all have read
        todo = np.flatnonzero(~done)
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        cadence = Cadence(SAVE_SHARE)
        for _ in self._add(sums, batches[self.processes.rank :: self.processes.world], workers, progress):
            cadence.save(lambda: sums.save(own, skipped=self.skipped))
        if self.processes.world > 1 or self.skipped:  # or the result may be refused, and the work lost
            sums.save(own, skipped=self.skipped)
        self.processes.wait()
        if self.processes.first:
            self._finish(sums, own)

    def _accumulator(self) -> Accumulator:
        config, images = self.config, self.images
        sizes = self.sae.d_sae, len(images.classnames), len(images)
        return Accumulator(*sizes, self.kind, config.tau, config.k, config.top)

    def _part(self, number: int) -> Path:
        return self.stage.path / f"part-{number:04d}.safetensors"

    def _done(self) -> np.ndarray:
        """Tell which images some part has seen: bool [N]. Skipped ones may be readable by now."""
        done = np.zeros(len(self.images), bool)
        for path in self.stage.path.glob("part-*.safetensors"):
            done |= self._accumulator_of(path)[0].seen
        return done

    def _accumulator_of(self, path: Path) -> tuple[Accumulator, dict[str, str]]:
        sums = self._accumulator()
        return sums, sums.load(path)["skipped"]

    @torch.no_grad()
    def _add(
        self, sums: Accumulator, batches: list[np.ndarray], workers: int, progress: bool
    ) -> Iterator[None]:
        """Add batches one by one, so that the caller may save in between."""
        source, backbone = _Readable(self.images, self.config.on_error), self.backbone
        bar = progress_bar(
            total=len(self.images), initial=sums.images, desc=f"atlas of {self.images.name}",
            unit="image", shown=progress and self.processes.first,
        )  # fmt: skip
        with bar:
            for (pixels, good, bad), batch in zip(
                read_batches(source, batches, workers), batches, strict=True
            ):
                self.skipped |= {str(index): why for index, why in bad}
                if len(good):
                    x = backbone.residual(backbone.normalize(pixels))[:, self.columns].float()
                    lists = latent_lists(self.sae, x.flatten(0, 1))
                    indices = np.array(good)
                    sums.update(lists, self.images.labels[indices], indices)
                bar.update(len(batch) * (self.processes.world if self.processes.first else 1))
                yield

    def _finish(self, sums: Accumulator, own: Path) -> None:
        parts = sorted(self.stage.path.glob("part-*.safetensors"))
        for path in parts:
            if path != own:
                other, skipped = self._accumulator_of(path)
                sums.merge(other)
                self.skipped |= skipped
        # what an earlier run skipped may have been read by this one
        skipped = [
            {"image": i, "why": why}
            for i, why in sorted((int(i), why) for i, why in self.skipped.items())
            if not sums.seen[i]
        ]
        if sums.images + len(skipped) != len(self.images):
            raise PatchSAEError(
                f"the pass over '{self.images.name}' saw {sums.images} of {len(self.images)} images, so it "
                f"is not finished; delete {self.stage.path}, then run again."
            )
        if skipped:
            unread = (
                f" that can be read: correct the files and run again ({len(skipped)} failed; the first: "
                f"{skipped[0]['why'].rstrip('.')})"
            )
            _check_counts(sums.class_images, self.images, self.config, unread)
        atlas = to_dataset(sums, self.images.classnames, self.kinds)
        # so that whoever is handed the dataset alone can tell what it describes
        atlas.attrs |= {name: self.stage.inputs[name] for name in ("sae", "weights", "backbone")}
        atlas.attrs["image_set"] = self.stage.inputs["images"]
        atlas.attrs |= {"name": self.images.name, "block": self.backbone.block}
        encoding = {
            name: {"chunks": tuple(CHUNK if dim == "latent" else n for dim, n in v.sizes.items())}
            for name, v in atlas.data_vars.items()
        }
        # format 2, because format 3 has no settled way to store class names
        path = self.stage.path / ATLAS
        with storing(path):
            atlas.to_zarr(path, mode="w", consolidated=False, zarr_format=2, encoding=encoding)
        self.stage.finish(ATLAS, images=sums.images, skipped=skipped)
        remove(*parts)


def to_dataset(sums: Accumulator, classnames: Sequence[str], kinds: Sequence[str]) -> xr.Dataset:
    """Return an accumulator's statistics as a labelled dataset, arrays transposed to name their axes.

    Dimensions: latent, klass, kind (of token), bin (of log10 activation), rank (of reference images), image
    and place (of a latent among an image's top ones). Definitions: paper §3.2, facts.md §4.5-4.7.
    """
    images, per_kind = sums.images, np.bincount(sums.kind, minlength=len(kinds))
    tokens = images * per_kind  # [K]
    mass, active = sums.class_sum.sum(1), sums.active_tokens.sum(0)
    value, label = sums.top_value.T, sums.top_label.T
    with np.errstate(invalid="ignore", divide="ignore"):
        latent = {
            "image_frequency": (sums.active_images / images, "share of images with an active token"),
            "image_frequency_tau": (sums.tau_images / images, "share of images with a token above tau"),
            "token_frequency": (active / tokens.sum(), "share of tokens"),
            "mean_activation": (mass / sums.active_images, "image mean over active images"),
            "mean_token_activation": (sums.token_sum.sum(0) / active, "activation of active tokens"),
            "entropy": (label_entropy(sums.class_sum.T), "nat, over all images (Eq. 3)"),
            "entropy_references": (
                reference_entropy(value, label),
                "nat, over the references (released code)",
            ),
            "label_std": (reference_std(value, label), "label number, over the references"),
            "label_std_all": (label_std(sums.class_sum.T), "label number, over all images"),
            "dataset_count": (sums.class_count.sum((0, 2), np.int64), "tokens above tau (Eq. 5)"),
        }
    data = {name: ("latent", array, {"units": unit}) for name, (array, unit) in latent.items()}
    add = {
        "active_tokens": (("kind", "latent"), sums.active_tokens, "tokens"),
        "token_sum": (("kind", "latent"), sums.token_sum, "sum of activations"),
        "histogram": (("latent", "bin"), sums.histogram, "tokens"),
        "class_count": (
            ("klass", "latent"),
            sums.class_count.sum(0, np.int64).T,
            "tokens above tau (Eq. 4)",
        ),
        "class_count_kind": (
            ("kind", "klass", "latent"),
            sums.class_count.transpose(0, 2, 1),
            "tokens above tau",
        ),
        "class_sum": (("klass", "latent"), sums.class_sum.T, "sum of image means"),
        "class_images": (("klass",), sums.class_images, "images"),
        "top_value": (("rank", "latent"), value, "image mean"),
        "top_index": (("rank", "latent"), sums.top_index.T, "image"),
        "top_label": (("rank", "latent"), label, "class number"),
        "top_count": (("rank", "latent"), sums.top_count.T, "tokens above tau"),
        "image_latent": (("image", "place"), sums.image_latent, "latent"),
        "image_value": (("image", "place"), sums.image_value, "image mean"),
        "tokens": (("kind",), tokens, "tokens"),
    }
    data |= {
        name: (dims, np.ascontiguousarray(v), {"units": unit}) for name, (dims, v, unit) in add.items()
    }
    coordinates = {
        "latent": np.arange(len(mass)),
        "klass": list(classnames),
        "kind": list(kinds),
        "rank": np.arange(sums.top_value.shape[1]),
        # upper edges of log10 activation; the last bin has none
        "bin": np.append(EDGES, np.inf),
    }
    attrs = {"images": images, "tokens": int(tokens.sum()), "tau": float(sums.tau)}
    return xr.Dataset(data, coordinates, attrs)
