"""Few-shot training sets: Dassl's draws, from a generator of their own, and a manifest of what was drawn.

Dassl groups the training images by label, in order of first appearance, and takes `random.sample(images,
shots)` of each; then min(shots, 4) of each class of val, from the same stream (facts.md §2). The draw
depends on the seed and on the order of the images in the set and on nothing else, so it is made before
the classes are divided: `few_shot(dataset, 16, seed=1).base()`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from patchsae.images.benchmark_files import some
from patchsae.images.sets import Dataset, ImageSet, Subset
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import digest, write_json

VAL_SHOTS = 4  # at most, by Dassl


def few_shot(dataset: Dataset, shots: int, seed: int, on_fewer: str = "take") -> Dataset:
    """Restrict train to `shots` images of each class, and val to min(shots, 4), as Dassl draws them.

    Images come in the order of the draw, class after class.

    Parameters
    ----------
    on_fewer : 'take' all images of a class that has fewer; 'raise' names the first such class of train

    Raises
    ------
    PatchSAEError : shots below 1; a half of the classes, or a set for testing only, was given; a class has
        too few images and on_fewer='raise'.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise PatchSAEError(f"shots={shots!r} must be a whole number of at least 1.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PatchSAEError(f"seed={seed!r} must be a whole number.")
    if on_fewer not in ("take", "raise"):
        raise PatchSAEError(f"on_fewer='{on_fewer}' is unknown; choose 'take' or 'raise'.")
    if isinstance(dataset.train, Subset) and dataset.train.relabel is not None:
        raise PatchSAEError(
            f"'{dataset.name}' has had its classes divided, and shots are drawn before that: call "
            "few_shot(...) first and base() or novel() on its result."
        )
    if not len(dataset.train):
        raise PatchSAEError(f"'{dataset.name}' is for testing only: it has no training image to draw.")
    if on_fewer == "raise" and (fewer := _classes_with_fewer(dataset.train, shots)):
        raise PatchSAEError(
            f"class '{fewer[0]['name']}' of '{dataset.name}' has {fewer[0]['images']} training images, "
            f"fewer than shots={shots}; ask for fewer shots, or give on_fewer='take'."
        )
    stream = random.Random(seed)
    train = dataset.train.subset(_draw(dataset.train.labels, shots, stream))
    if dataset.val is None:
        return replace(dataset, train=train)
    return replace(
        dataset,
        train=train,
        val=dataset.val.subset(_draw(dataset.val.labels, min(shots, VAL_SHOTS), stream)),
    )


def write_manifest(
    path: str | Path, dataset: Dataset, shots: int, seed: int, on_fewer: str = "take"
) -> Path:
    """Draw as `few_shot` does from the whole `dataset`, and write down what was drawn, as JSON.

    The manifest holds the data set's name, seed, shots, [image, label] for each image of train and val,
    the classes that had fewer images, and a sha256 of all that. An image is its path in the data set's
    folder of images; of a set without files it is its index, and the set's fingerprint is added.

    Raises
    ------
    PatchSAEError : as `few_shot`; the file cannot be written.
    """
    drawn = few_shot(dataset, shots, seed, on_fewer)
    manifest = {"dataset": dataset.name, "shots": shots, "seed": seed, "classnames": dataset.classnames}
    manifest["train"] = _entries(drawn.train)
    manifest["val"] = None if drawn.val is None else _entries(drawn.val)
    val_fewer = [] if dataset.val is None else _classes_with_fewer(dataset.val, min(shots, VAL_SHOTS))
    manifest["fewer"] = {"train": _classes_with_fewer(dataset.train, shots), "val": val_fewer}
    manifest["fingerprints"] = _fingerprints(dataset)
    return write_json(path, manifest | {"sha256": digest(manifest)})


def read_manifest(path: str | Path, dataset: Dataset) -> Dataset:
    """Restrict the whole `dataset` to the images that a manifest lists, in its order.

    Raises
    ------
    PatchSAEError : the file is missing, damaged or edited; it is of another data set; the data set lacks
        images that it lists, or has another label for one.
    """
    path = Path(path)
    manifest = _checked(path)
    if manifest["dataset"] != dataset.name:
        raise PatchSAEError(
            f"manifest '{path}' is of the data set '{manifest['dataset']}', not of '{dataset.name}'; open "
            "that one, or give another manifest."
        )
    if manifest["classnames"] != list(dataset.classnames):
        raise PatchSAEError(
            f"manifest '{path}' has other classes than '{dataset.name}' here; write it again from this one."
        )
    if manifest["fingerprints"] != _fingerprints(dataset):
        raise PatchSAEError(
            f"manifest '{path}' counts the images of another '{dataset.name}' (other images per class, or "
            "another version); write it again from this one."
        )
    if (manifest["val"] is None) != (dataset.val is None):
        raise PatchSAEError(
            f"manifest '{path}' and '{dataset.name}' must both have a val split, or neither; write it "
            "again."
        )
    train = _restrict(dataset.train, manifest["train"], path)
    if dataset.val is None:
        return replace(dataset, train=train)
    return replace(dataset, train=train, val=_restrict(dataset.val, manifest["val"], path))


def _draw(labels: np.ndarray, shots: int, stream: random.Random) -> list[int]:
    grouped = np.argsort(labels, kind="stable")  # within a class the order stays that of the set
    distinct, first, counts = np.unique(labels, return_index=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    drawn: list[int] = []
    for position in np.argsort(first) if len(distinct) else ():  # by first appearance
        images = grouped[starts[position] : starts[position] + counts[position]].tolist()
        drawn += images if len(images) < shots else stream.sample(images, shots)
    return drawn


def _classes_with_fewer(images: ImageSet, shots: int) -> list[dict[str, int | str]]:
    # by label, since two classes may share a name
    counts = np.bincount(images.labels, minlength=len(images.classnames)).tolist()
    return [
        {"label": label, "name": images.classnames[label], "images": count}
        for label, count in enumerate(counts)
        if count < shots
    ]


def _entries(images: ImageSet) -> list[list[str | int]]:
    return [[images.key(index), int(label)] for index, label in enumerate(images.labels)]


def _fingerprints(dataset: Dataset) -> dict[str, str]:
    """Identify the parts whose images are known by index alone; a path says enough."""
    parts = {"train": dataset.train, "val": dataset.val}
    return {
        name: images.fingerprint()
        for name, images in parts.items()
        if images is not None and len(images) and isinstance(images.key(0), int)
    }


def _checked(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text("utf-8"))
        said = manifest.pop("sha256")
        whole = said == digest(manifest) and {"dataset", "classnames", "fingerprints"} <= manifest.keys()
        lists = [manifest["train"], manifest["val"]]
    except FileNotFoundError:
        raise PatchSAEError(f"manifest '{path}' does not exist; make it with write_manifest.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PatchSAEError(
            f"'{path}' is no manifest of few-shot images ({type(error).__name__}: {error}); write it again."
        ) from error
    if not whole or not all(_is_list(found) for found in lists if found is not None) or lists[0] is None:
        raise PatchSAEError(f"manifest '{path}' was damaged or edited: its sha256 differs; write it again.")
    return manifest


def _is_list(entries: object) -> bool:
    return isinstance(entries, list) and all(
        isinstance(entry, list)
        and len(entry) == 2
        and type(entry[0]) in (str, int)
        and type(entry[1]) is int
        for entry in entries
    )


def _restrict(images: ImageSet, entries: Sequence[tuple[str | int, int]], path: Path) -> ImageSet:
    wanted = {key for key, _ in entries}
    there = {key: index for index in range(len(images)) if (key := images.key(index)) in wanted}
    if missing := [str(key) for key, _ in entries if key not in there]:
        raise PatchSAEError(
            f"manifest '{path}' lists {len(missing)} images that '{images.name}' lacks under "
            f"{images.split} ({some(missing)}); complete the data set, or write the manifest again."
        )
    chosen = [there[key] for key, _ in entries]
    said = [label for _, label in entries]
    if wrong := [entries[i][0] for i in np.flatnonzero(images.labels[chosen] != said)]:
        raise PatchSAEError(
            f"manifest '{path}' gives {len(wrong)} images another label than '{images.name}' has here "
            f"(such as {wrong[0]}); write it again."
        )
    return images.subset(chosen)
