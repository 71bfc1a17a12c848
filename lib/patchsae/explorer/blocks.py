"""The explorer's data on disk: small scripts that a page without a server or kernel loads when needed.

`fetch` does not work from file://, `<script src>` does: a block is one call of
`patchsaeExplorer.receive(folder, name, data)`. Arrays are base64 of little-endian numbers. Activations are
float32, as computed; masks of reference images alone are rounded, to 1/255 of the strongest patch.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from PIL import Image
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.explorer.data import (
    BATCH,
    Activations,
    ExplorerConfig,
    References,
    activations,
    atlas_digest,
    encode_images,
    fires_on_nearly_everything,
    misfit,
    picked,
    references,
    statistics,
)
from patchsae.images.sets import ImageSet
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import Stage, write_atomic, write_json
from patchsae.sae.model import SAE

FORMAT = 3
VERSION = 1  # raised when the same inputs give other blocks of the same format
INDEX = "index.json"
LATENTS = 64  # latents per block of references
CELLS, COLUMNS = 30, 10  # reference images per sheet, and side by side on it
LIMIT = 2_000_000  # bytes of a block


class Shown(NamedTuple):
    """A model that can be chosen."""

    title: str
    backbone: Backbone


class ReferenceSet(NamedTuple):
    """Images to take references from, described by an atlas of CLIP."""

    title: str
    atlas: xr.Dataset
    images: ImageSet


def write_blocks(
    sae: SAE,
    sae_hash: str,
    models: Sequence[Shown],
    gallery: Sequence[tuple[str, ImageSet]],
    sets: Sequence[ReferenceSet],
    root: str | Path,
    config: ExplorerConfig | None = None,
    progress: bool = True,
) -> Path:
    """Write everything that a page shows, or find it again; return its folder `root/explorer-<hash>`.

    A killed run goes on where it was.

    Parameters
    ----------
    sae_hash : names the SAE, as in `make_atlas`
    models : one alone, or CLIP first and then the adapted models to compare it with
    gallery : titles and image sets, all of whose images can be picked
    sets : the first set's atlas gives every latent's statistics; an atlas that does not fit is left out
        and named in a message that the explorer shows

    Raises
    ------
    PatchSAEError : no model, models of different blocks or grids, or an empty gallery.
    """
    config, clip = config or ExplorerConfig(), _checked(models)
    if not sum(len(images) for _, images in gallery):
        raise PatchSAEError("the explorer's gallery has no image; give at least one image set.")
    notices = [misfit(one.atlas, sae, sae_hash, clip, one.images) for one in sets]
    fitting = [one for one, notice in zip(sets, notices, strict=True) if not notice]
    general = sets[0].atlas if sets and not notices[0] else None
    inputs = {
        "format": FORMAT,
        "sae": sae_hash,
        "weights": sae.fingerprint(),
        "models": [[model.title, model.backbone.fingerprint()] for model in models],
        "gallery": [[title, images.fingerprint()] for title, images in gallery],
        "sets": [[one.title, atlas_digest(one.atlas), one.images.fingerprint()] for one in sets],
        "config": config,
    }
    stage = Stage.open(root, "explorer", inputs, version=VERSION)

    def make() -> None:
        write = partial(_write, stage.path)
        found = [references(one.atlas, config.references) for one in fitting]
        write("names", lambda: {"sets": [list(one.images.classnames) for one in fitting]})
        write("latents", lambda: _latents(sae, general, config))
        _write_references(write, sae, clip, fitting, found, config, progress)
        captions = _write_gallery(write, sae, models, gallery, config, progress)
        index = {
            "format": FORMAT,
            "folder": stage.path.name,
            "sae": sae_hash,
            "weights": sae.fingerprint(),
            "latents": sae.d_sae,
            "grid": list(clip.grid),
            "size": clip.image_size,
            "models": [model.title for model in models],
            "backbones": [model.backbone.fingerprint() for model in models],
            "gallery": captions,
            "sets": [
                {"title": one.title, "images": len(one.images), "shown": len(refs.images)}
                for one, refs in zip(fitting, found, strict=True)
            ],
            "general": None if general is None else sets[0].title,
            "tau": None if general is None else float(general.attrs["tau"]),
            "config": config,
            "chunk": LATENTS,
            "cells": CELLS,
            "columns": COLUMNS,
            "notices": [notice for notice in notices if notice],
        }
        write_json(stage.path / INDEX, index)
        stage.finish("*.js", INDEX, bytes=sum(path.stat().st_size for path in stage.path.glob("*.js")))

    return stage.once(make)


def _checked(models: Sequence[Shown]) -> Backbone:
    if not models:
        raise PatchSAEError(
            "the explorer has no model; give one, or CLIP first and then the adapted models."
        )
    clip = models[0].backbone
    for title, other in models[1:]:
        if (other.block, other.grid, other.image_size) != (clip.block, clip.grid, clip.image_size):
            raise PatchSAEError(
                f"model '{title}' is cut after block {other.block} with {other.grid} patches, CLIP after "
                f"{clip.block} with {clip.grid}; cut both alike."
            )
    return clip


def pack(array: np.ndarray) -> dict[str, str]:
    """Encode an array for a block: whole numbers ≥ 0 in as few bytes as hold them, others as float32."""
    if array.dtype.kind in "iub":
        largest = int(array.max(initial=0))
        kind = next(f"u{size}" for size in (1, 2, 4) if largest < 256**size)
    else:
        kind = "f4"
    content = np.ascontiguousarray(array).astype(f"<{kind}").tobytes()
    return {"t": kind, "b": base64.b64encode(content).decode()}


def unpack(packed: dict[str, str]) -> np.ndarray:
    """Decode what `pack` encoded."""
    return np.frombuffer(base64.b64decode(packed["b"]), f"<{packed['t']}")


def activation_block(found: Activations) -> dict[str, Any]:
    """Return one image under one model as a block."""
    return {name: pack(array) for name, array in found._asdict().items()}


def picture_block(picture: Image.Image) -> dict[str, str]:
    """Return an image, as the model sees it, as a block."""
    return {"picture": data_uri(picture, 90)}


def data_uri(picture: Image.Image, quality: int) -> str:
    """Encode a picture as WebP inside a URI."""
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def check_block(path: Path) -> Any:
    """Return what a block holds.

    A page runs blocks as scripts, and `results/` may be somebody else's, so whatever does more than hand
    over data is refused.

    Raises
    ------
    OSError, ValueError : it is missing; it is no call of `receive` alone, with its own folder and name and
        JSON.
    """
    text, (head, tail) = path.read_text(encoding="utf-8"), _call(path.parent.name, path.stem)
    if not (text.startswith(head) and text.endswith(tail)):
        raise ValueError("it does more than hand over data")
    return json.loads(text[len(head) : -len(tail)])


def _call(folder: str, name: str) -> tuple[str, str]:
    return f'patchsaeExplorer.receive("{folder}","{name}",', ");\n"


def read_block(folder: str | Path, name: str) -> Any:
    """Read a block back, as the live explorer does.

    Raises PatchSAEError if it is missing, damaged, or no name of a block.
    """
    path = Path(folder) / f"{name}.js"
    try:
        if not re.fullmatch(r"[a-z]+(-\d+){0,2}", name):
            raise ValueError("no name of a block")
        return check_block(path)
    except (OSError, ValueError) as error:
        raise PatchSAEError(
            f"{path} cannot be read ({error}): delete its folder and run the notebook again."
        ) from error


def read_activations(folder: str | Path, image: int, model: int) -> Activations:
    """Read what one image of the gallery activates under one model; raises as `read_block` does."""
    block = read_block(folder, f"acts-{image}-{model}")
    return Activations(*(unpack(block[name]) for name in Activations._fields))


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read what a folder of blocks holds; raises PatchSAEError if it holds none."""
    path = Path(folder) / INDEX
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PatchSAEError(
            f"{path} cannot be read ({error}): give a folder that write_blocks wrote."
        ) from error


def _write(folder: Path, name: str, make: Callable[[], Any]) -> None:
    path = folder / f"{name}.js"
    with suppress(OSError, ValueError):  # what a killed run left, or somebody put there, is made anew
        check_block(path)
        return
    content = json.dumps(make(), separators=(",", ":"))
    text = content.join(_call(folder.name, name))
    if len(text) > LIMIT:
        raise PatchSAEError(
            f"block '{name}' of the explorer takes {len(text):,} bytes, more than {LIMIT:,}: lower "
            f"`references` or `thumbnail`, or use a sparser SAE."
        )
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _latents(sae: SAE, atlas: xr.Dataset | None, config: ExplorerConfig) -> dict[str, Any]:
    left_out = fires_on_nearly_everything(atlas, config.frequent, sae.d_sae)
    shown = {} if atlas is None else statistics(atlas)
    return {"left_out": pack(left_out)} | {name: pack(array) for name, array in shown.items()}


def _write_gallery(write, sae, models, gallery, config, progress) -> list[dict[str, str]]:
    images = picked([images for _, images in gallery])
    titles = [title for title, images in gallery for _ in range(len(images))]
    captions = []
    for (image_set, index), title in zip(images, titles, strict=True):
        captions.append({"title": image_set.classnames[image_set.labels[index]], "set": title})
    pictures = [_picture(image_set.load([index]).images[0]) for image_set, index in images]
    write("gallery", lambda: {"sheet": data_uri(_sheet(pictures, config.thumbnail), 85)})
    for number, picture in enumerate(pictures):
        write(f"image-{number}", partial(picture_block, picture))
    jobs = progress_bar(list(enumerate(models)), desc="gallery under every model", shown=progress)
    for m, model in jobs:
        number = 0
        for _, image_set in gallery:
            for found in encode_images(sae, model.backbone, image_set, range(len(image_set))):
                write(f"acts-{number}-{m}", partial(activation_block, found))
                number += 1
    return captions


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _sheet(pictures: Sequence[Image.Image], side: int) -> Image.Image:
    """Lay pictures out side by side, COLUMNS in a row."""
    columns = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // COLUMNS) * side))
    for cell, picture in enumerate(pictures):
        place = (cell % COLUMNS * side, cell // COLUMNS * side)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), place)
    return sheet


Maps = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]  # (rank, latent): patches, activations


def _write_references(write, sae, clip, sets, found, config, progress) -> None:
    encoded = []
    for number, (one, refs) in enumerate(zip(sets, found, strict=True)):
        maps: Maps = {}
        with progress_bar(total=len(refs.images), desc=f"references of {one.title}", shown=progress) as bar:
            for page, first in enumerate(range(0, len(refs.images), CELLS)):
                cells = refs.images[first : first + CELLS]
                pixels = one.images.load(cells).images
                write(f"sheet-{number}-{page}", partial(_reference_sheet, pixels, config.thumbnail))
                maps |= _reference_maps(sae, clip, refs, cells, pixels)
                bar.update(len(cells))
        encoded.append(maps)
    for chunk, first in enumerate(range(0, sae.d_sae, LATENTS)):
        latents = range(first, min(first + LATENTS, sae.d_sae))
        parts = list(zip(found, encoded, strict=True))
        write(f"refs-{chunk}", lambda latents=latents, parts=parts: _reference_block(latents, parts))


def _reference_sheet(pixels: Tensor, side: int) -> dict[str, str]:
    return {"sheet": data_uri(_sheet([_picture(one) for one in pixels], side), 80)}


def _reference_maps(sae: SAE, clip: Backbone, refs: References, cells: np.ndarray, pixels: Tensor) -> Maps:
    """Compute where each latent fires on those of its reference images that are among the cells."""
    maps: Maps = {}
    shown = [one for batch in pixels.split(BATCH) for one in activations(sae, clip, batch)]
    for index, image in zip(cells, shown, strict=True):
        for rank, latent in zip(*np.nonzero(refs.index == index), strict=True):
            row = int(np.searchsorted(image.latent, latent))
            # another batch may round a latent's faintest activation to none
            if row < len(image.latent) and image.latent[row] == latent:
                entries = slice(image.start[row], image.start[row + 1])
                maps[int(rank), int(latent)] = image.patch[entries], image.value[entries]
    return maps


def _reference_block(latents: range, parts: Sequence[tuple[References, Maps]]) -> dict[str, Any]:
    """Return the references of some latents: arrays run over latents, and over ranks inside a latent."""
    block = []
    for refs, maps in parts:
        here = np.s_[:, latents.start : latents.stop]
        index = refs.index[here].T.ravel()
        start, patches, weights = [0], [], []
        for latent in latents:
            rows = [
                maps.get((rank, latent), (np.zeros(0, int), np.zeros(0))) for rank in range(len(refs.index))
            ]
            peak = max((value.max(initial=0) for _, value in rows), default=0)
            for patch, value in rows:
                patches.append(patch)
                weights.append(np.rint(255 * value / max(peak, 1e-12)).astype(np.uint8))
                start.append(start[-1] + len(patch))
        block.append({
            # 0 is no image, so that the array has no sign
            "cell": pack(np.where(index >= 0, np.searchsorted(refs.images, index) + 1, 0)),
            "value": pack(refs.value[here].T.ravel()),
            "label": pack(np.maximum(refs.label[here].T.ravel(), 0)),
            "start": pack(np.array(start)),
            "patch": pack(np.concatenate(patches)),
            "weight": pack(np.concatenate(weights)),
        })  # fmt: skip
    return {"sets": block}
