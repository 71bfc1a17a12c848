"""The gallery as blocks: each picture, what it activates in every model, and what the models answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.explorer.answers import Answerer, Answers, Change, Pictures, class_vectors
from patchsae.explorer.data import BATCH, Activations, activations_of, image_values, strongest
from patchsae.explorer.packing import as_picture, data_uri, pack, sheet
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar
from patchsae.sae.model import SAE

RANKED = 100  # latents of a class's ranking that can be kept alone or switched off together


class Shown(NamedTuple):
    """A model that can be chosen."""

    title: str
    backbone: Backbone


class First(NamedTuple):
    """What a page may open with; the largest: an answer that CLIP lacks, that is lost, that loses most."""

    only: bool
    lost: bool
    drop: float
    image: int
    adapted: int
    latent: int


def texts_of(models: Sequence[Shown], gallery: Sequence[Pictures]) -> tuple[list[list[Tensor | None]], str]:
    """Return the class vectors of each picture set under each model, and why there are none, if so."""
    found: list[list[Tensor | None]] = []
    for pictures in gallery:
        if len(set(pictures.names)) < 2:
            found.append([None] * len(models))
            continue
        try:
            found.append([class_vectors(m.backbone, pictures.names, pictures.templates) for m in models])
        except PatchSAEError as error:
            return [[None] * len(models) for _ in gallery], f"There are no answers: {error}"
    return found, ""


def activation_block(found: Activations) -> dict[str, Any]:
    """Return one image under one model as a block."""
    return {name: pack(array) for name, array in found._asdict().items()}


def picture_block(picture: Image.Image) -> dict[str, str]:
    """Return an image, as the model sees it, as a block."""
    return {"picture": data_uri(picture)}  # to the last bit, for models read it too


def answer_block(latents: Sequence[int], answers: Answers) -> dict[str, Any]:
    """Return one image's answers under one model: as it is, then without each of some latents."""
    return {
        "latent": pack(np.asarray(latents, np.int64)),
        "class": pack(answers.klass),
        "share": pack(answers.share),
        "true": pack(answers.true),
    }


def write_gallery(
    write, sae: SAE, models: Sequence[Shown], gallery: Sequence[Pictures], texts: list[list[Tensor | None]],
    atlases: dict[str, xr.Dataset], left_out: np.ndarray, config, progress: bool,
) -> tuple[list[dict[str, Any]], First | None]:  # fmt: skip
    """Write every picture of the gallery; return their captions and what the page opens with."""
    captions, pictures, best = [], [], []
    for g, one in enumerate(gallery):
        for index in range(len(one.images)):
            label = one.images.classnames[one.images.labels[index]]
            captions.append({"title": label, "set": one.title, "group": g, "label": one.label(index)})
            pictures.append(as_picture(one.images.load([index]).images[0]))
    write("gallery", lambda: {"sheet": data_uri(sheet(pictures, config.thumbnail), 85)})
    for number, picture in enumerate(pictures):
        write(f"image-{number}", partial(picture_block, picture))
    answers: dict[int, list[tuple[list[int], Answers]]] = {}
    for m, model in progress_bar(list(enumerate(models)), desc="gallery under every model", shown=progress):
        answerer, number = Answerer(sae, model.backbone), 0
        for one, vectors in zip(gallery, texts, strict=True):
            for x, label in _streams(model.backbone, one):
                (found,) = activations_of(sae, model.backbone, x)
                write(f"acts-{number}-{m}", partial(activation_block, found))
                if vectors[m] is not None:
                    latents = strongest(image_values(found, sae.d_sae), left_out, config.answered)
                    changes = [Change(), *(Change({s: 0.0}) for s in latents)]
                    answers.setdefault(number, []).append(
                        (latents, answerer(x, vectors[m], changes, label))
                    )
                number += 1
    for number, caption in enumerate(captions):
        given, label = answers.get(number, []), caption["label"]
        block = {
            "models": [answer_block(*one) for one in given],
            "order": pack(_ranking(gallery[caption["group"]], atlases, label)),
        }
        write(f"answers-{number}", lambda block=block: block)
        best += _first_views(number, label, given)
    return captions, max(best, default=None)


def _streams(backbone: Backbone, pictures: Pictures):
    """Yield the tokens [1, T, d] and the label of each picture."""
    with torch.no_grad():
        for batch in pictures.images.batches(BATCH):
            x = backbone.residual(backbone.normalize(batch.images))
            for row, index in enumerate(batch.indices.tolist()):
                yield x[row : row + 1], pictures.label(index)


def _ranking(pictures: Pictures, atlases: dict[str, xr.Dataset], label: int) -> np.ndarray:
    """Return the latents in the order in which masks of this class take them (Fig. 5), if it is known."""
    atlas = atlases.get(pictures.title)
    if atlas is None or label < 0 or list(atlas.klass.values) != list(pictures.images.classnames):
        return np.zeros(0, np.int64)
    count = atlas.class_count.values[label].astype(np.int64)
    order = np.argsort(-count, kind="stable")[:RANKED]
    return order[count[order] > 0]


def _first_views(number: int, label: int, given: list[tuple[list[int], Answers]]) -> list[First]:
    """List what could open the page: a right answer of the last model, and a latent that it needs."""
    found: list[First] = []
    if label < 0 or not given:
        return found
    clip_right = bool(given[0][1].klass[0, 0] == label)
    for m, (latents, answers) in enumerate(given):
        if answers.klass[0, 0] != label or (len(given) > 1 and not m):
            continue
        for row, latent in enumerate(latents, 1):
            lost, drop = bool(answers.klass[row, 0] != label), float(answers.true[0] - answers.true[row])
            found.append(First(not clip_right and m > 0, lost, drop, number, m, latent))
    return found
