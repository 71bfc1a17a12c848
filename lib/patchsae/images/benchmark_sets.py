"""The paper's eleven benchmarks, ImageNet's four variants and CIFAR-100, opened from folders on disk.

The folders are laid out as CoOp and MaPLe ask (facts.md §2): `DATA/<name>/` with the images and CoOp's
split file. No split is ever made up here: numbers can be compared only if the split is the published one.

    patchsae data --data DATA --check      # what is there, where to get the rest
    patchsae data --data DATA --download dtd
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from patchsae.images.benchmark_files import (
    Part,
    read_json_split,
    read_text_split,
    read_wnid_names,
    require_images,
    some,
)
from patchsae.images.benchmark_table import BENCHMARKS, PAGE, RECIPES, ROBUSTNESS, Recipe
from patchsae.images.cifar import FILES as CIFAR_FILES
from patchsae.images.cifar import CifarImages
from patchsae.images.files import FileImages, Frame, class_folders, files_by_class
from patchsae.images.sets import Dataset
from patchsae.runs.errors import PatchSAEError


def open_benchmark(name: str, data_root: str | Path, frame: int | Frame) -> Dataset:
    """Open one data set; no image is decoded, and every file that a split file names is known to exist.

    Splits are train and test, with val where the split file has one. ImageNet's val plays test. The sets
    of ROBUSTNESS have no image in train. Class names are those of the split file, so words may be joined
    by '_' (facts.md §2).

    Parameters
    ----------
    name : one of RECIPES
    data_root : the folder that holds one folder per data set
    frame : of the model (`Backbone.frame`), or the side of the square that `load` gives, px

    Raises
    ------
    PatchSAEError : unknown name; something is missing or damaged, with the page to get it from.
    """
    if name not in RECIPES:
        raise PatchSAEError(f"data set '{name}' is unknown; choose one of {', '.join(RECIPES)}.")
    recipe, folder = RECIPES[name], Path(data_root) / name
    if name == "imagenet":
        sets = _imagenet(recipe, folder, frame)
    elif name in ROBUSTNESS:
        sets = _variant(name, recipe, folder, frame)
    elif name == "cifar-100":
        sets = _cifar(recipe, folder, frame)
    else:
        sets = _from_split(name, recipe, folder, frame)
    return Dataset(name, recipe.title, sets["test"].classnames, recipe.template, **sets)


def open_found(
    data_root: str | Path, frame: int | Frame, names: Sequence[str] = BENCHMARKS
) -> tuple[Dataset, ...]:
    """Open those of `names` that are complete, in that order.

    One without a folder is left out silently; one with a folder that is not complete, with a warning.
    """
    opened = []
    for name in names:
        if (Path(data_root) / name).is_dir():
            try:
                opened.append(open_benchmark(name, data_root, frame))
            except PatchSAEError as error:
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
    return tuple(opened)


def _from_split(name: str, recipe: Recipe, folder: Path, frame: int | Frame) -> dict[str, FileImages]:
    root, remedy = folder / recipe.folder, recipe.remedy
    if recipe.split:
        _require(name, [folder / recipe.split, root], remedy)
        split = read_json_split(folder / recipe.split, recipe.rename, remedy)
        source = folder / recipe.split
    else:
        lists = {part: folder / f"images_variant_{part}.txt" for part in ("train", "val", "test")}
        source = folder / "variants.txt"
        _require(name, [source, *lists.values(), root], remedy)
        split = read_text_split(source, lists, ".jpg", remedy)
    require_images(root, split.parts.values(), source, remedy)
    return {
        part: FileImages(root, found.names, found.labels, split.classnames, frame, name, part)
        for part, found in split.parts.items()
    }


def _imagenet(recipe: Recipe, folder: Path, frame: int | Frame) -> dict[str, FileImages]:
    roots = {"train": folder / recipe.folder / "train", "test": folder / recipe.folder / "val"}
    _require("imagenet", roots.values(), recipe.remedy)
    listed = folder / "classnames.txt"
    if listed.is_file():
        names = read_wnid_names(listed, recipe.remedy)
        return _by_class("imagenet", roots, lambda wnids: _named(wnids, names, listed), frame, recipe)
    return _by_class("imagenet", roots, lambda wnids: _open_clips_names(wnids, listed), frame, recipe)


def _variant(name: str, recipe: Recipe, folder: Path, frame: int | Frame) -> dict[str, FileImages]:
    root, remedy = folder / recipe.folder, recipe.remedy
    lists = folder / "classnames.txt", folder.parent / "imagenet" / "classnames.txt"
    listed = next((path for path in lists if path.is_file()), lists[0])
    _require(name, [root, listed], remedy)
    names = read_wnid_names(listed, remedy)
    if name != "imagenetv2":
        found = _by_class(name, {"test": root}, lambda wnids: _named(wnids, names, listed), frame, recipe)
        test = found["test"]
    else:
        # its folders are label numbers, which do not sort as text
        folders = class_folders(root)
        if wrong := [label for label in folders if not label.isdecimal() or int(label) >= len(names)]:
            raise PatchSAEError(f"'{root}/{wrong[0]}' is no label of the classes in '{listed}'; {remedy}.")
        folders.sort(key=int)
        files = _full_folders(root, folders, remedy)
        labels = np.array([int(label) for label in folders], np.int64)[files.labels]
        test = FileImages(root, files.names, labels, tuple(names.values()), frame, name, "test")
    train = FileImages(root, [], [], test.classnames, frame, name, "train")
    return {"train": train, "test": test}


def _cifar(recipe: Recipe, folder: Path, frame: int | Frame) -> dict[str, CifarImages | FileImages]:
    official = [folder / recipe.folder, folder, folder.parent / recipe.folder]
    for place in official:
        if (place / "meta").is_file():
            _require("cifar-100", [place / file for file in CIFAR_FILES], recipe.remedy)
            return {part: CifarImages(place, frame, part, recipe.remedy) for part in ("train", "test")}
    roots = {part: folder / part for part in ("train", "test")}
    by_class = any(root.is_dir() for root in roots.values())
    needed = roots.values() if by_class else [official[0] / file for file in CIFAR_FILES]
    _require("cifar-100", needed, recipe.remedy)
    return _by_class("cifar-100", roots, list, frame, recipe)


def _by_class(
    name: str,
    roots: dict[str, Path],
    named: Callable[[list[str]], Sequence[str]],
    frame: int | Frame,
    recipe: Recipe,
) -> dict[str, FileImages]:
    """Open parts with one folder per class, the same in each; `named` turns folders into class names."""
    folders = {part: class_folders(root) for part, root in roots.items()}
    for part, root in roots.items():
        if not folders[part]:
            raise PatchSAEError(f"'{root}' holds no folder per class; {recipe.remedy}.")
        for other in roots:
            if extra := set(folders[other]) - set(folders[part]):
                raise PatchSAEError(
                    f"'{root}' lacks class folders that '{roots[other]}' has ({some(sorted(extra))}); "
                    f"{recipe.remedy}."
                )
    classnames = named(folders["test"])
    files = {part: _full_folders(root, folders[part], recipe.remedy) for part, root in roots.items()}
    return {
        part: FileImages(roots[part], found.names, found.labels, classnames, frame, name, part)
        for part, found in files.items()
    }


def _full_folders(root: Path, folders: Sequence[str], remedy: str) -> Part:
    part = Part(*files_by_class(root, folders))
    counts = np.bincount(part.labels, minlength=len(folders))
    if empty := [folder for folder, count in zip(folders, counts, strict=True) if not count]:
        raise PatchSAEError(
            f"'{root}' has {len(empty)} class folders without an image ({some(empty)}); {remedy}."
        )
    return part


def _named(wnids: list[str], names: dict[str, str], listed: Path) -> list[str]:
    if unknown := [wnid for wnid in wnids if wnid not in names]:
        raise PatchSAEError(
            f"'{listed}' does not name {len(unknown)} of the class folders ({some(unknown)}); "
            f"get the whole file as {PAGE}#imagenet says."
        )
    return [names[wnid] for wnid in wnids]


def _open_clips_names(wnids: list[str], listed: Path) -> list[str]:
    from patchsae.runs import compat  # noqa: F401  (before open_clip)

    # isort: split
    import open_clip

    names = open_clip.IMAGENET_CLASSNAMES
    if len(wnids) != len(names):
        raise PatchSAEError(
            f"'{listed}' is missing, and only a folder of all {len(names)} classes can do without (there "
            f"are {len(wnids)}); get it as {PAGE}#imagenet says."
        )
    return names


def _require(name: str, paths: Iterable[Path], remedy: str) -> None:
    if missing := [str(path) for path in paths if not path.exists()]:
        quoted = "', '".join(missing)
        raise PatchSAEError(f"data set '{name}' lacks '{quoted}'; {remedy}.")


def describe(name: str, data_root: str | Path) -> tuple[bool, str]:
    """Count classes and images of a data set that opens; tell whether it is whole, and the counts.

    Where it is not, the text has those of the whole set too, and where to get it: a folder that was half
    downloaded has no list that would miss its images.

    Raises
    ------
    PatchSAEError : as `open_benchmark`.
    """
    data, recipe = open_benchmark(name, data_root, frame=1), RECIPES[name]  # nothing is decoded
    parts = {"train": data.train, "val": data.val, "test": data.test}
    found = {part: len(images) for part, images in parts.items() if images is not None and len(images)}
    text = f"{len(data.classnames):,} classes; " + ", ".join(f"{n:,} {part}" for part, n in found.items())
    if whole := (len(data.classnames), tuple(found.values())) == (recipe.classes, recipe.images):
        return whole, text
    images = " + ".join(f"{n:,}" for n in recipe.images)
    return whole, (
        f"{text}, but the whole set has {recipe.classes:,} classes; {images} images: {recipe.remedy}."
    )


def check_sets(data: Path, check: Sequence[str] = (), download: Sequence[str] = ()) -> int:
    """Fetch and check data sets, print a line on each, and return whether something is missing.

    Raises
    ------
    PatchSAEError : an unknown name; no such folder; a download failed.
    """
    names = [*download, *check] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in RECIPES]:
        raise PatchSAEError(f"data set '{unknown[0]}' is unknown; choose one of {', '.join(RECIPES)}.")
    if not data.is_dir() and not download:
        raise PatchSAEError(f"--data: the folder '{data}' does not exist; make it, or give another.")
    for name in download:
        from patchsae.images.benchmark_download import download as fetch

        fetch(name, data / name, RECIPES[name].remedy)
    all_whole = True
    for name in dict.fromkeys(names):
        try:
            whole, told = describe(name, data)
        except PatchSAEError as error:
            whole, told = False, str(error)
        all_whole &= whole
        print(f"{name:21} {'complete' if whole else 'incomplete':10}  {told}")
    return int(not all_whole)
