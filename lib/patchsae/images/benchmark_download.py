"""Images of benchmarks, fetched by torchvision and moved to where CoOp's layout wants them.

torchvision is used as a downloader only: none of its splits is CoOp's (facts.md §2).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from patchsae.runs import compat  # noqa: F401  (before torchvision)
from patchsae.runs.errors import PatchSAEError

# isort: split
from torchvision import datasets


class Fetched(NamedTuple):
    """A data set that torchvision can fetch."""

    kind: str
    """Class in torchvision.datasets."""
    folder: str
    """Where it puts the data under its root."""
    items: tuple[str, ...]
    """What is moved from there, the images last; () moves everything."""


SOURCES = {
    "caltech-101": Fetched("Caltech101", "caltech101", ("101_ObjectCategories",)),
    "oxford_pets": Fetched("OxfordIIITPet", "oxford-iiit-pet", ("annotations", "images")),
    "oxford_flowers": Fetched("Flowers102", "flowers-102", ("imagelabels.mat", "jpg")),
    "food-101": Fetched("Food101", "food-101", ("meta", "images")),
    "fgvc_aircraft": Fetched("FGVCAircraft", "fgvc-aircraft-2013b/data", ()),
    "dtd": Fetched("DTD", "dtd/dtd", ("imdb", "labels", "images")),
    "eurosat": Fetched("EuroSAT", "eurosat", ("2750",)),
    "cifar-100": Fetched("CIFAR100", "", ("cifar-100-python",)),
}


def download(name: str, folder: Path, remedy: str) -> None:
    """Fetch the images of a data set into `folder`, unless they are there.

    Everything is unpacked beside `folder` first and then moved by renaming, so a download that was stopped
    leaves no part of a data set behind that looks whole.

    Raises
    ------
    PatchSAEError : torchvision cannot fetch this one; the download failed.
    """
    if name not in SOURCES:
        raise PatchSAEError(f"data set '{name}' cannot be downloaded from here: {remedy}.")
    source = SOURCES[name]
    wanted = source.items or ("images",)
    if all((folder / item).exists() for item in wanted):
        return
    staging = folder.with_name(f".download-{name}")
    shutil.rmtree(staging, ignore_errors=True)  # what was stopped may be half unpacked
    try:
        staging.mkdir(parents=True)
        getattr(datasets, source.kind)(staging, download=True)
        unpacked = staging / source.folder
        folder.mkdir(exist_ok=True)
        # the images last, as they are what a later call takes for the whole
        everything = sorted(os.listdir(unpacked), key=lambda item: (item in wanted, item))
        for item in source.items or everything:
            if not (folder / item).exists():
                os.replace(unpacked / item, folder / item)
    except Exception as error:  # of networks, archives and checksums, each with its own
        raise PatchSAEError(
            f"the download of '{name}' failed ({error}); try again, or {remedy}."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
