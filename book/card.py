"""Pictures of the data card, drawn by the code that draws every scene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from patchbook.scenes.catalogue import concepts
from patchbook.scenes.pictograms import SceneConfig, render
from patchbook.scenes.sprites import STYLES
from patchsae.runs.stage import write_atomic

FOLDER = "_static/card"
SEED, SIDE = 0, 336
SHOWN = "cat"
"""The concept that is shown in every style."""
COLOURS = np.array([[255, 255, 255], [0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167]], np.uint8)
"""Of a mask: the background, then each object; Okabe and Ito's."""


def draw_card(book: Path) -> list[str]:
    """Draw a concept in each style, a scene with its mask, a written word and a concept never trained on.

    Writes PNGs of three times the size of a scene, in whole pixels, below `book`; returns their names.
    """
    names = [concept.name for concept in concepts()]
    alone = SceneConfig(objects=(1.0, 0.0, 0.0, 0.0), pairs="all", word_rate=0.0)
    styles = [*STYLES, "silhouette"]
    at = np.full(len(styles), names.index(SHOWN))
    found = render("test", SEED, range(len(styles)), alone, (at, np.arange(len(styles))))
    pictures = dict(zip(styles, _pixels(found.images), strict=True))
    crowd = render("test", SEED, range(64), SceneConfig(objects=(0.0, 0.0, 1.0, 0.0), word_rate=0.0))
    # the scene whose three objects are all well seen
    seen = [min(np.bincount(mask.ravel(), minlength=4)[1:4]) for mask in crowd.masks.numpy()]
    best = int(np.argmax(seen))
    pictures |= {"scene": _pixels(crowd.images)[best], "mask": COLOURS[crowd.masks[best].numpy()]}
    written = render("test", SEED, range(64), SceneConfig(objects=(1.0, 0.0, 0.0, 0.0), word_rate=1.0))
    other = np.flatnonzero(written.word != written.concepts[:, 0])
    pictures["word"] = _pixels(written.images)[other[0]]
    unseen = [number for number, concept in enumerate(concepts()) if not any(concept.trained)]
    new = render("test", SEED, [0], alone, (np.array(unseen[:1]), np.array([0])))
    pictures["unseen"] = _pixels(new.images)[0]
    for name, picture in pictures.items():
        _save(book / FOLDER / f"{name}.png", picture)
    return list(pictures)


def _pixels(images) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def _save(path: Path, picture: np.ndarray) -> None:
    large = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    write_atomic(path, lambda temporary: large.save(temporary, "PNG"))
