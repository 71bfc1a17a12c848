"""Files that describe a benchmark, read and checked: split files, class lists, folders of images.

Nothing here knows a benchmark by name. Every error names the file and ends in `remedy`, a clause such as
"get it from https://…" that the caller gives.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from patchsae.runs.errors import PatchSAEError


class Part(NamedTuple):
    """One of train, val, test: which files, and their labels."""

    names: list[str]
    """Paths relative to the folder of images, with '/'."""
    labels: np.ndarray
    """int64 [N], index into the class names."""


class Split(NamedTuple):
    """What a benchmark's split files say."""

    classnames: tuple[str, ...]
    """One name per label, in label order."""
    parts: dict[str, Part]
    """train and test, and val where there is one."""


Entry = tuple[str, int, str]  # relative path, label, class name


def read_json_split(path: Path, rename: Callable[[str], str | None], remedy: str) -> Split:
    """Read a split_zhou_*.json: train, val and test, each a list of [path, label, class name].

    Parameters
    ----------
    rename : gives a class its final name; None drops its images, and later labels move up

    Raises
    ------
    PatchSAEError : the file is missing or damaged; an entry has the wrong types or leaves the folder; a
        label has two names; labels have gaps; two parts share an image.
    """
    content = _read_json(path, remedy)
    if not isinstance(content, dict) or not {"train", "test"} <= content.keys():
        raise PatchSAEError(f"'{path}' does not hold the lists train and test; {remedy}.")
    entries = {part: content[part] for part in ("train", "val", "test") if part in content}
    for part, found in entries.items():
        if not isinstance(found, list):
            raise PatchSAEError(f"'{path}' holds no list under '{part}'; {remedy}.")
        if wrong := [position for position, entry in enumerate(found) if not _is_entry(entry)]:
            raise PatchSAEError(
                f"'{path}': entry {wrong[0]} of '{part}' is {json.dumps(found[wrong[0]])[:80]}, not "
                f"[path inside the folder of images, label, class name]; {remedy}."
            )
    renamed: dict[str, list[Entry]] = {
        part: [
            (str(PurePosixPath(name)), label, final)
            for name, label, classname in found
            if (final := rename(classname)) is not None
        ]
        for part, found in entries.items()
    }
    if empty := [part for part in ("train", "test") if not renamed[part]]:
        raise PatchSAEError(f"'{path}' lists no image under '{empty[0]}'; {remedy}.")
    dropped = any(len(renamed[part]) < len(found) for part, found in entries.items())
    return _checked_split(path, {part: found for part, found in renamed.items() if found}, dropped, remedy)


def read_text_split(classes: Path, lists: dict[str, Path], suffix: str, remedy: str) -> Split:
    """Read FGVC Aircraft's split: one file of class names, and per part lines of "image class name".

    Parameters
    ----------
    classes : one class name a line; the line number is the label
    lists : the file of each part
    suffix : of the images, which the lists leave out

    Raises
    ------
    PatchSAEError : a file is missing; a line has no class name or an unknown one; two parts share an image.
    """
    classnames = read_lines(classes, remedy)
    label_of = {name: label for label, name in enumerate(classnames)}
    if len(label_of) < len(classnames):
        twice = Counter(classnames).most_common(1)[0][0]
        raise PatchSAEError(f"'{classes}' lists the class '{twice}' twice; {remedy}.")
    entries: dict[str, list[Entry]] = {}
    for part, path in lists.items():
        entries[part] = []
        for number, line in enumerate(read_lines(path, remedy), 1):
            image, _, classname = line.partition(" ")
            if classname not in label_of or not _stays_inside(image + suffix):
                raise PatchSAEError(
                    f"'{path}': line {number} is '{line[:80]}', not an image and a class of "
                    f"{classes.name}; {remedy}."
                )
            entries[part].append((image + suffix, label_of[classname], classname))
    _check_disjoint(next(iter(lists.values())), entries, remedy)
    return Split(tuple(classnames), {part: _part(found) for part, found in entries.items()})


def read_wnid_names(path: Path, remedy: str) -> dict[str, str]:
    """Read ImageNet's classnames.txt: lines of "n01440764 tench"; the order of lines is that of labels.

    Raises
    ------
    PatchSAEError : the file is missing; a line has no name; a wnid is listed twice.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, remedy), 1):
        wnid, _, name = line.partition(" ")
        if not name.strip() or wnid in names:
            raise PatchSAEError(
                f"'{path}': line {number} is '{line[:80]}', not a new class id and its name; {remedy}."
            )
        names[wnid] = name.strip()
    return names


def read_lines(path: Path, remedy: str) -> list[str]:
    """Read the lines of a text file that are not blank; raises PatchSAEError if there are none."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise PatchSAEError(f"'{path}' is missing; {remedy}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PatchSAEError(f"'{path}' cannot be read ({error}); {remedy}.") from error
    if not any(lines):
        raise PatchSAEError(f"'{path}' is empty; {remedy}.")
    return [line for line in lines if line]


def require_images(root: Path, parts: Iterable[Part], source: Path, remedy: str) -> None:
    """Check that every image a split names is there, by listing each folder once.

    Raises
    ------
    PatchSAEError : the folder is missing, or lacks images; their number and the first three are named.
    """
    if not root.is_dir():
        raise PatchSAEError(f"the folder of images '{root}' is missing; {remedy}.")
    there: dict[str, frozenset[str]] = {}
    missing: list[str] = []
    for part in parts:
        for name in part.names:
            folder, _, file = name.rpartition("/")
            if folder not in there:
                there[folder] = _listing(root / folder)
            if file not in there[folder]:
                missing.append(name)
    if missing:
        raise PatchSAEError(
            f"'{root}' lacks {len(missing)} of the images that {source.name} lists ({some(missing)}); "
            f"{remedy}."
        )


def some(names: Sequence[str]) -> str:
    """Join the first three names for an error message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _listing(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def _read_json(path: Path, remedy: str) -> object:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise PatchSAEError(f"'{path}' is missing; {remedy}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PatchSAEError(f"'{path}' is no readable JSON ({error}); {remedy}.") from error


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 3
        and [type(value) for value in entry] == [str, int, str]
        and entry[1] >= 0
        and bool(entry[2])
        and _stays_inside(entry[0])
    )


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and not {*name} & {*"\\\0"}


def _checked_split(path: Path, entries: dict[str, list[Entry]], renumber: bool, remedy: str) -> Split:
    name_of: dict[int, str] = {}
    for found in entries.values():
        for image, label, classname in found:
            if name_of.setdefault(label, classname) != classname:
                raise PatchSAEError(
                    f"'{path}' gives label {label} two names, '{name_of[label]}' and '{classname}' "
                    f"(at {image}); {remedy}."
                )
    labels = sorted(name_of)
    if renumber:
        new = {label: position for position, label in enumerate(labels)}
        entries = {part: [(i, new[label], c) for i, label, c in found] for part, found in entries.items()}
    elif labels != list(range(len(labels))):
        gap = next(position for position, label in enumerate(labels) if position != label)
        raise PatchSAEError(f"'{path}' has no image of label {gap} but one of {labels[-1]}; {remedy}.")
    _check_disjoint(path, entries, remedy)
    names = tuple(name_of[label] for label in labels)
    return Split(names, {part: _part(found) for part, found in entries.items()})


def _check_disjoint(path: Path, entries: dict[str, list[Entry]], remedy: str) -> None:
    images = {part: {image for image, _, _ in found} for part, found in entries.items()}
    for one, other in combinations(images, 2):
        if shared := images[one] & images[other]:
            raise PatchSAEError(
                f"'{path}': {one} and {other} share {len(shared)} images, such as {min(shared)}; {remedy}."
            )


def _part(entries: Sequence[Entry]) -> Part:
    return Part([name for name, _, _ in entries], np.array([label for _, label, _ in entries], np.int64))
