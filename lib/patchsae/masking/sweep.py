"""Top-k latent masking: what a few latents do to the prediction (paper §4.1; facts.md §4.8).

The trunk runs once per image and the SAE encodes once. Masks of one ranking are nested, so all their
reconstructions come from one reading of the active latents, and only the blocks after the hook run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from patchsae.clip.backbone import Backbone, zero_shot_logits
from patchsae.clip.tail import Tail
from patchsae.images.sets import ImageSet
from patchsae.masking.masked_tokens import SWITCHES, Mode, bucket_tables, masked_tokens
from patchsae.masking.rankings import CLASS, PREDICTED, RANDOM, Ranking, check_atlas, rankings
from patchsae.masking.through import label_rank, text_digest
from patchsae.runs.checks import check_counts
from patchsae.runs.disk import remove, storing
from patchsae.runs.errors import PatchSAEError, choose
from patchsae.runs.intervals import bootstrap
from patchsae.runs.processes import Processes, join
from patchsae.runs.products import fast_float32
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import Stage
from patchsae.runs.tensors import load_tensors, save_tensors
from patchsae.runs.threads import spread
from patchsae.sae.cpu import Lists, by_token
from patchsae.sae.model import SAE
from patchsae.sae.step import latent_lists
from patchsae.training.activations import Tokens, token_columns

PAPER_SIZES = (1, 2, 5, 10, 50, 100, 500, 1000, 2000)  # and all latents
VERSION = 1  # raised when the same inputs give other answers
RESULT = "masking.zarr"
CHUNK_IMAGES = 64
TILE_BYTES = 8e6  # of rebuilt tokens held at a time by a thread, where one ranking needs no more


@dataclass(frozen=True)
class MaskingConfig:
    """What is masked, and how."""

    sizes: tuple[int, ...] = ()
    """Numbers k of latents switched on or off; none takes the paper's. All latents always come last."""
    mode: Mode = Mode.REPLACE
    """What stands in for a token."""
    tokens: Tokens = Tokens.ALL
    """Which tokens are replaced; the others stay as they are."""
    include_prompt_tokens: bool = False
    """Whether a MaPLe backbone's prompt tokens are replaced too, as in the released code."""
    random: int = 5
    """Rankings drawn at random, to compare with."""
    seed: int = 0
    """Decides the random rankings."""

    def __post_init__(self):
        choose(self, "mode", Mode)
        choose(self, "tokens", Tokens)
        object.__setattr__(self, "sizes", tuple(int(k) for k in self.sizes))
        if list(self.sizes) != sorted(set(self.sizes)) or (self.sizes and self.sizes[0] < 1):
            raise PatchSAEError(f"sizes={list(self.sizes)} must ascend from 1 or more without repeats.")
        if len(self.sizes) > 254:
            raise PatchSAEError(f"sizes has {len(self.sizes)} entries; 254 is the most.")
        if self.random < 0:
            raise PatchSAEError(f"random={self.random} must not be negative.")


class Masker:
    """Classify images under every mask of some rankings."""

    def __init__(
        self, sae: SAE, backbone: Backbone, text: Tensor, ranked: Sequence[Ranking], config: MaskingConfig
    ):
        self.sae, self.backbone, self.text, self.config = sae, backbone, text, config
        self.sizes = all_sizes(config.sizes, sae.d_sae)
        if bad := [r.name for r in ranked if r.order.shape[1] != sae.d_sae]:
            raise PatchSAEError(f"the ranking '{bad[0]}' is not one of this SAE's {sae.d_sae} latents.")
        self.ranked = list(ranked)
        # the oracle's ranking and the predicted class's are one array
        tables = {
            r.digest: bucket_tables(r.order, self.sizes) for r in {r.digest: r for r in ranked}.values()
        }
        self.tables = [tables[ranking.digest] for ranking in ranked]
        columns = token_columns(backbone, config.tokens)
        if config.include_prompt_tokens:
            columns = np.union1d(columns, np.flatnonzero(backbone.token_kind == "prompt"))
        self.columns = torch.from_numpy(columns).to(backbone.device)
        self.tail = Tail(backbone)

    @torch.no_grad()
    @fast_float32()
    def logits(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of images uint8 [B, 3, H, W]: unmasked [B, C], masked [B, G, 2, sizes, C]."""
        x = self.backbone.residual(self.backbone.normalize(images))  # [B, T, d]
        plain = zero_shot_logits(self.backbone, self.backbone.finish(x), self.text)
        inside = x[:, self.columns].float()
        lists = by_token(latent_lists(self.sae, inside.flatten(0, 1)), inside.shape[0] * inside.shape[1])
        rows = {CLASS: labels.cpu().numpy(), PREDICTED: plain.argmax(-1).cpu().numpy()}
        which = [rows.get(r.name, np.zeros(len(x), np.int64)) for r in self.ranked]

        def one(i: int, _: int) -> Tensor:
            start = lists.start[i * inside.shape[1] : (i + 1) * inside.shape[1] + 1]
            entries = slice(start[0], start[-1])
            own = Lists(start - start[0], lists.index[entries], lists.value[entries])
            tables = np.stack([t[row[i]] for t, row in zip(self.tables, which, strict=True)])
            return self._masked(x[i], inside[i], own, tables)

        if x.device.type == "cpu":
            masked = spread(one, [(i, i + 1) for i in range(len(x))])
        else:
            masked = [one(i, i + 1) for i in range(len(x))]
        return plain, torch.stack(masked)

    @torch.no_grad()
    def _masked(self, x: Tensor, inside: Tensor, lists: Lists, tables: np.ndarray) -> Tensor:
        """Return one image's masked logits [G, 2, sizes, C] from its tokens x [T, d]."""
        n, rows = len(self.sizes), []
        size = 2 * n * x.numel() * 4
        step = max(1, int(TILE_BYTES // size))  # rankings at a time
        for g in range(0, len(tables), step):
            part = masked_tokens(self.sae, inside, lists, tables[g : g + step], n, self.config.mode)
            if len(inside) < len(x):
                whole = x.float().expand(*part.shape[:3], *x.shape).clone()
                whole[..., self.columns, :] = part
                part = whole
            embeddings = self.tail(part.flatten(0, 2).to(x.dtype))
            rows.append(zero_shot_logits(self.backbone, embeddings, self.text))
        return torch.cat(rows).view(len(tables), 2, n, -1)


def all_sizes(sizes: Sequence[int], d_sae: int) -> tuple[int, ...]:
    """Return ascending sizes (the paper's as far as they go, if there are none) and all latents.

    Raises
    ------
    PatchSAEError : a size exceeds the latents.
    """
    if sizes and sizes[-1] > d_sae:
        raise PatchSAEError(f"sizes asks for {sizes[-1]} latents, but the SAE has {d_sae}; take fewer.")
    return *(k for k in sizes or PAPER_SIZES if k < d_sae), d_sae


def sweep(
    sae: SAE,
    backbone: Backbone,
    images: ImageSet,
    text: Tensor,
    atlas: xr.Dataset,
    config: MaskingConfig,
    root: str | Path,
    sae_hash: str,
    atlas_backbone: Backbone | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> xr.Dataset:
    """Classify every image under every mask, or read the result if `root` holds it.

    A sweep that was killed goes on at the first unfinished chunk of images. Under torchrun all processes
    call this with a common `root` and share the chunks.

    Parameters
    ----------
    text : [C, e], one text vector per class of `images`
    atlas : statistics of the images that latents are ranked on, of the same classes
    sae_hash : names the SAE, as in `make_atlas`
    atlas_backbone : the backbone the atlas was made with, where it is not `backbone` (Fig. 11, 15)

    Returns
    -------
    Dimensions image, ranking, switch, k. `prediction`, `rank` (classes before the true one; 0 is right),
    `cross_entropy` (nat); the same of the unmasked model as `original_*`; `label`.

    Raises
    ------
    PatchSAEError : a batch of no images; the atlas is of another SAE, backbone, block or set of classes; a
        class has no image in it; a size exceeds the latents; a label is outside the classes; a logit is
        not finite; a saved chunk is damaged.
    """
    check_counts(batch_size=batch_size)
    check_atlas(atlas, sae, sae_hash, atlas_backbone or backbone, images.classnames)
    if len(text) != len(images.classnames):
        raise PatchSAEError(
            f"text has {len(text)} vectors, but '{images.name}' has {len(images.classnames)} classes; "
            f"make one per class name."
        )
    if not len(images) or not 0 <= images.labels.min() <= images.labels.max() < len(text):
        raise PatchSAEError(
            f"'{images.name}' has no images, or labels outside its class names; correct it."
        )
    ranked = rankings(atlas, config.random, config.seed)
    masker = Masker(sae, backbone, text, ranked, config)
    inputs = {
        "images": images.fingerprint(),
        "backbone": backbone.fingerprint(),
        "sae": sae_hash,
        "weights": sae.fingerprint(),
        "text": text_digest(text),
        "rankings": {ranking.name: ranking.digest for ranking in ranked},
        "sizes": masker.sizes,
        "config": config,
    }
    name = f"masking-{images.name.replace('/', '-')}"
    stage, processes = Stage.open(root, name, inputs, version=VERSION), join(backbone.device)

    def make() -> None:
        _run(masker, images, stage, processes, batch_size, progress)
        processes.wait()
        if processes.first:
            _finish(masker, images, atlas, stage)

    stage.once(make, processes)
    return xr.open_zarr(stage.path / RESULT, consolidated=False).load()


def chunks(images: ImageSet, stage: Stage) -> dict[Path, np.ndarray]:
    """Cut a set into what a killed run loses at most: files in the stage's folder to image indices."""
    return {
        stage.path / f"chunk-{start:08d}.safetensors": np.arange(
            start, min(start + CHUNK_IMAGES, len(images))
        )
        for start in range(0, len(images), CHUNK_IMAGES)
    }


def check_whole(rows: int, images: ImageSet, stage: Stage) -> None:
    """Refuse to finish a stage whose chunks hold another number of images than its set."""
    if rows != len(images):
        raise PatchSAEError(
            f"the chunks in {stage.path} hold {rows} of the {len(images)} images of '{images.name}'; "
            f"delete that folder, then run again."
        )


def write_chunk(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of a chunk, atomically, with its own name."""
    save_tensors(path, {name: torch.from_numpy(value) for name, value in arrays.items()}, path.name)


def read_chunk(path: Path, of: str) -> dict[str, np.ndarray]:
    """Read the arrays of a chunk; raises PatchSAEError, which calls the whole `of`, if it is damaged."""
    try:
        arrays, name = load_tensors(path)
        if name != path.name:
            raise ValueError("it is another part")
        return {name: value.numpy() for name, value in arrays.items()}
    except ValueError as error:
        raise PatchSAEError(
            f"'{path}' holds no part of {of} ({error}); delete it and run again."
        ) from error


def _run(
    masker: Masker, images: ImageSet, stage: Stage, processes: Processes, batch_size: int, progress: bool
) -> None:
    """Write this process's share of the chunks that are not there yet."""
    missing = [(path, indices) for path, indices in chunks(images, stage).items() if not path.exists()]
    processes.wait()  # nobody writes before all have looked
    bar = progress_bar(
        total=len(images), initial=max(0, len(images) - len(missing) * CHUNK_IMAGES),
        desc=f"masks on {images.name}", unit="image", shown=progress and processes.first,
    )  # fmt: skip
    with bar:
        for path, indices in missing[processes.rank :: processes.world]:
            parts = []
            for first in range(0, len(indices), batch_size):
                batch = images.load(indices[first : first + batch_size])
                parts.append(_judge(*masker.logits(batch.images, batch.labels), batch.labels))
            arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            write_chunk(path, arrays)
            bar.update(len(indices) * processes.world)


def _judge(plain: Tensor, masked: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Reduce logits [B, C] and [B, G, 2, sizes, C] to what is kept of them."""
    found = {}
    for prefix, logits in (("original_", plain), ("", masked)):
        own = labels.to(logits.device).view(-1, *[1] * (logits.ndim - 2)).expand(logits.shape[:-1])
        flat = F.cross_entropy(logits.flatten(0, -2), own.flatten(), reduction="none")
        found |= {
            f"{prefix}prediction": logits.argmax(-1).int(),
            f"{prefix}rank": label_rank(logits, own).int(),
            f"{prefix}cross_entropy": flat.view(own.shape),
        }
    return {name: np.ascontiguousarray(value.cpu().numpy()) for name, value in found.items()}


def _finish(masker: Masker, images: ImageSet, atlas: xr.Dataset, stage: Stage) -> None:
    paths = list(chunks(images, stage))
    parts = [read_chunk(path, "this sweep") for path in paths]
    check_whole(sum(len(part["rank"]) for part in parts), images, stage)
    dims = ("image", "ranking", "switch", "k")
    units = {"prediction": "class number", "rank": "classes before the true one", "cross_entropy": "nat"}
    data = {"label": ("image", images.labels, {"units": "class number"})}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        about = {"units": units[name.removeprefix("original_")]}
        data[name] = (dims[: values.ndim], values, about)
    names = [ranking.name for ranking in masker.ranked]
    coordinates = {"ranking": names, "switch": list(SWITCHES), "k": list(masker.sizes)}
    attrs = {"name": images.name, "classes": len(images.classnames), "ranked_on": atlas.attrs["name"]}
    attrs |= {
        "mode": str(masker.config.mode),
        "tokens": str(masker.config.tokens),
        "d_sae": masker.sae.d_sae,
    }
    result = xr.Dataset(data, coordinates, attrs)
    # format 2, because format 3 has no settled way to store names
    with storing(stage.path / RESULT):
        result.to_zarr(stage.path / RESULT, mode="w", consolidated=False, zarr_format=2)
    stage.finish(RESULT, images=len(images))
    remove(*paths)


def curves(result: xr.Dataset, top: int = 1, seed: int = 0, draws: int = 2000) -> xr.Dataset:
    """Average a sweep over images: `accuracy` with `low` and `high`, dimensions ranking, switch, k.

    An image counts as right if its class is among the `top` most likely. Random rankings are averaged image
    by image into one, 'random'. Intervals are 95 % percentile bootstraps over images; those of `gain`, the
    difference to 'random' on the same images, are paired. The attribute `original` is the unmasked model's
    accuracy with its interval.
    """
    right = (result["rank"].values < top).astype(np.float64)  # [N, G, 2, K]
    names = [str(name) for name in result.ranking.values]
    drawn = np.array([name.startswith(RANDOM.format("")) for name in names])
    kept = [name for name, random in zip(names, drawn, strict=True) if not random]
    rows = right[:, ~drawn]
    dims = ("ranking", "switch", "k")
    if drawn.any():
        mean = right[:, drawn].mean(1, keepdims=True)
        gain = zip(("gain", "gain_low", "gain_high"), bootstrap(rows - mean, seed, draws), strict=True)
        rows, names = np.concatenate([rows, mean], 1), [*kept, "random"]
    found = dict(zip(("accuracy", "low", "high"), bootstrap(rows, seed, draws), strict=True))
    coordinates = {"ranking": names, "switch": result.switch.values, "k": result.k.values}
    about = result.attrs | {"images": result.sizes["image"], "top": top}
    about["original"] = bootstrap(result.original_rank.values < top, seed, draws)
    table = xr.Dataset({name: (dims, value) for name, value in found.items()}, coordinates, about)
    if drawn.any():
        ours = {name: (dims, value) for name, value in gain}
        table = table.merge(xr.Dataset(ours, coordinates | {"ranking": kept}), join="outer")
        table = table.sel(ranking=names)
    return table
