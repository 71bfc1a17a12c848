"""The explorer's data on disk: small scripts that a page without a server or kernel loads when needed.

`fetch` does not work from file://, `<script src>` does: a block is one call of
`patchsaeExplorer.receive(folder, name, data)`. Arrays are base64 of little-endian numbers. Activations are
float32, as computed; masks of reference images alone are rounded, to 1/255 of the strongest patch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from patchsae.clip.backbone import Backbone
from patchsae.explorer.answers import Pictures
from patchsae.explorer.data import (
    Activations,
    ExplorerConfig,
    References,
    atlas_digest,
    fires_on_nearly_everything,
    misfit,
    references,
    statistics,
)
from patchsae.explorer.gallery import Shown, texts_of, write_gallery
from patchsae.explorer.names import Vocabulary, labels_as_words, name_latents
from patchsae.explorer.packing import COLUMNS, pack, unpack
from patchsae.explorer.references import CELLS, LATENTS, Looks, write_references
from patchsae.explorer.relations import fires_on, leading_class, near_block
from patchsae.explorer.weights import worker_source, write_model
from patchsae.images.sets import ImageSet, short_hash
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import Stage, write_atomic, write_json
from patchsae.sae.model import SAE

FORMAT = 4
VERSION = 4  # raised when the same inputs give other blocks of the same format
INDEX = "index.json"
LIMIT = 2_000_000  # bytes of a block


class ReferenceSet(NamedTuple):
    """Images to take references from, described by an atlas of CLIP."""

    title: str
    atlas: xr.Dataset
    images: ImageSet


def write_blocks(
    sae: SAE,
    sae_hash: str,
    models: Sequence[Shown],
    gallery: Sequence[Pictures],
    sets: Sequence[ReferenceSet],
    root: str | Path,
    config: ExplorerConfig | None = None,
    progress: bool = True,
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Write everything that a page shows, or find it again; return its folder `root/explorer-<hash>`.

    A killed run goes on where it was.

    Parameters
    ----------
    sae_hash : names the SAE, as in `make_atlas`
    models : one alone, or CLIP first and then the adapted models to compare it with
    gallery : image sets, all of whose images can be picked, with the classes that models choose from
    sets : the first set's atlas gives every latent's statistics; an atlas that does not fit is left out
        and named in a message that the explorer shows
    vocabulary : words to name latents by; None takes the class names of the first set, if it has two

    Raises
    ------
    PatchSAEError : no model, models of different blocks or grids, or an empty gallery.
    """
    config, clip = config or ExplorerConfig(), _checked(models)
    gallery = [Pictures(*one) for one in gallery]
    if not sum(len(one.images) for one in gallery):
        raise PatchSAEError("the explorer's gallery has no image; give at least one image set.")
    notices = [misfit(one.atlas, sae, sae_hash, clip, one.images) for one in sets]
    fitting = [one for one, notice in zip(sets, notices, strict=True) if not notice]
    general = sets[0].atlas if sets and not notices[0] else None
    inputs = {
        "format": FORMAT,
        "sae": sae_hash,
        "weights": sae.fingerprint(),
        "models": [[model.title, model.backbone.fingerprint()] for model in models],
        "gallery": [[one.title, one.images.fingerprint(), *one[2:]] for one in gallery],
        "sets": [[one.title, atlas_digest(one.atlas), one.images.fingerprint()] for one in sets],
        "words": vocabulary
        and [*vocabulary[:2], vocabulary.images.fingerprint(), digest(vocabulary.shows)],
        "config": config,
        "program": short_hash(worker_source()),  # a page hands it to its worker
    }
    stage = Stage.open(root, "explorer", inputs, version=VERSION)

    def make() -> None:
        write = partial(_write, stage.path)
        found = [references(one.atlas, config.references) for one in fitting]
        texts, why = texts_of(models, gallery)
        if why:
            notices.append(why)
        write(
            "names",
            lambda: {
                "sets": [list(one.images.classnames) for one in fitting],
                "classes": [list(one.names) for one in gallery],
            },
        )
        write("latents", lambda: _latents(sae, general, config))
        looks = write_references(write, sae, clip, fitting, found, config, progress)
        words = None if why else vocabulary or _own_vocabulary(fitting, found, config.judged)
        write("labels", lambda: _labels(sae, clip, found, looks, words, progress))
        fires = None if general is None else fires_on(general, sae.d_sae)
        for chunk, first in enumerate(range(0, sae.d_sae, LATENTS)):
            write(f"near-{chunk}", partial(near_block, sae, fires, first))
        left_out = fires_on_nearly_everything(general, config.frequent, sae.d_sae)
        atlases = {one.title: one.atlas for one in fitting}
        captions, opening = write_gallery(
            write, sae, models, gallery, texts, atlases, left_out, config, progress
        )
        engine, reason = write_model(stage.path, sae, models, texts)
        index = {
            "format": FORMAT,
            "engine": engine,
            "no_engine": reason,
            "folder": stage.path.name,
            "sae": sae_hash,
            "weights": sae.fingerprint(),
            "latents": sae.d_sae,
            "grid": list(clip.grid),
            "size": clip.image_size,
            "groups": [
                {"title": one.title, "templates": list(one.templates), "asked": row[0] is not None}
                for one, row in zip(gallery, texts, strict=True)
            ],
            "models": [model.title for model in models],
            "backbones": [model.backbone.fingerprint() for model in models],
            "gallery": captions,
            "first": opening and opening._asdict(),
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
            "named": words is not None and looks is not None,
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


def digest(known: np.ndarray) -> str:
    """Hash a table of yes and no with its shape."""
    return short_hash([list(known.shape), np.packbits(known).tolist()])


def check_block(path: Path) -> Any:
    """Return what a block holds.

    A page runs blocks as scripts, and `results/` may be somebody else's, so whatever does more than hand
    over data is refused.

    Raises
    ------
    OSError, ValueError : it is missing; it is no call of `receive` alone, with its own folder and name and
        JSON.
    """
    raw, (head, tail) = path.read_bytes(), _call(path.parent.name, path.stem)
    text = raw.decode("utf-16" if raw.startswith(b"\xff\xfe") else "utf-8")  # weights are the former
    if not (text.startswith(head) and text.endswith(tail)):
        raise ValueError("it does more than hand over data")
    found = json.loads(text[len(head) : -len(tail)], strict=False)  # weights are any characters
    if path.stem == "engine" and found.get("source") != worker_source():
        raise ValueError("the program in it is not this version's")
    return found


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


def _labels(
    sae: SAE, clip: Backbone, found: list[References], looks: Looks | None, vocabulary: Vocabulary | None,
    progress: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the names of latents with their proof, and the class that each leads to in every set."""
    block: dict[str, Any] = {"leading": [pack(leading_class(refs)) for refs in found]}
    if vocabulary is None or looks is None:
        return block
    living = (found[0].index >= 0).any(0)
    named = name_latents(sae, clip, looks.mean, living, vocabulary, looks.tokens, progress)
    return block | {
        "words": list(vocabulary.words),
        "word": pack(named.word + 1),
        "auroc": pack(named.auroc),
        "others": pack(named.others),
        "proven": pack(named.proven),
    }


def _own_vocabulary(
    sets: Sequence[ReferenceSet], found: list[References], judged: int
) -> Vocabulary | None:
    """Take the class names of the first set, judged on pictures of it that are no latent's reference."""
    if not sets or len(sets[0].images.classnames) < 2:
        return None
    others = np.setdiff1d(np.arange(len(sets[0].images)), found[0].images)
    if len(others) > judged:
        others = np.sort(np.random.default_rng(0).permutation(others)[:judged])
    return labels_as_words(sets[0].images.subset(others))
