"""What the parameters of the book's notebooks may be: one table, asked before a kernel starts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from patchsae.runs.errors import PatchSAEError

MARKS = {"scale", "results"}  # parameters that every notebook of the book has, and by which one is known
MOST = 10**9  # of a number of images, of latents, of anything that is counted


class Range(NamedTuple):
    """The values that a parameter may have; of a list, those of each item."""

    least: float = -math.inf
    most: float = MOST
    words: tuple[str, ...] = ()
    pattern: str = ""

    def __str__(self) -> str:
        if self.words:
            return f"one of {', '.join(map(repr, self.words))}"
        if self.pattern:
            return f"text of the form {self.pattern}"
        if self.most < MOST:
            return f"from {self.least:g} to {self.most:g}"
        return f"{self.least:g} or more" if self.least > -math.inf else "any finite number"

    def holds(self, value: Any) -> bool:
        """Tell whether a value is in the range; what is neither text nor a number always is."""
        if isinstance(value, (list, tuple)):
            return all(map(self.holds, value))
        if isinstance(value, str):
            return (
                value in self.words if self.words else re.fullmatch(self.pattern or ".*", value) is not None
            )
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return math.isfinite(value) and self.least <= value <= self.most
        return True


def _each(names: str, allowed: Range) -> dict[str, Range]:
    return dict.fromkeys(names.split(), allowed)


RANGES: Mapping[str, Range] = {
    "scale": Range(words=("embedded", "paper")),
    "device": Range(pattern=r"cpu|mps|cuda(:\d+)?"),
    "mode": Range(words=("replace", "replace_bias", "add_error")),
    "tokens": Range(words=("all", "cls", "patches")),
    "l1": Range(0),
    "tau": Range(0),
    "frequent": Range(0, 1),
    # no vision transformer of open_clip has more blocks; which the model has is asked when it is built
    **_each("block blocks", Range(1, 64)),
    **_each("large_block", Range(0, 64)),
    **_each("seed prompt_seed", Range(0, 2**32 - 1)),
    "workers": Range(0, 1024),
    "jobs": Range(1, 1024),
    # counts of which 0 stands for all, or for none
    **_each(
        "rank_images half_images class_images table_images confusion_images test_images cls_images "
        "cls_different_images variant_images split_images novel_images",
        Range(0),
    ),
    **_each(
        "benchmark_images live_images ghost_images atlas_images dataset_images mask_images truth_images "
        "truth_pairs known_scenes classes block_atlas_images words word_images own_rank_images "
        "contrast_images draws match_latents learned_images purity_images probe_images probe_concepts "
        "images expansion active own_sae_images own_atlas_images block_images row_images different_images "
        "gallery_images k references top random sizes",
        Range(1),
    ),
}


def ranges_of(declared: Collection[str]) -> Mapping[str, Range]:
    """Return the table for a notebook of the book; any other gives names its own meanings."""
    return RANGES if set(declared) >= MARKS else {}


def check_ranges(given: Mapping[str, Any], declared: Collection[str], where: object) -> None:
    """Refuse values outside the table.

    Raises
    ------
    PatchSAEError : names every such parameter, its value and what is allowed.
    """
    known = ranges_of(declared)
    wrong = [
        f"{name}={value!r} must be {known[name]}"
        for name, value in given.items()
        if name in known and not known[name].holds(value)
    ]
    if wrong:
        raise PatchSAEError(f"Parameters of {where} are out of range: {'; '.join(wrong)}.")
