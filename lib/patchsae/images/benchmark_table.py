"""The table of data sets: where each lies in CoOp's layout, its template, its class names, its page.

Facts are those of facts.md §2; numbers of images are CoOp's, and of the variants their authors'.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

PAGE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
PHOTO = "a photo of a {}."


def _same(name: str) -> str:
    return name


@dataclass(frozen=True)
class Recipe:
    """How one data set is laid out, and what to tell who lacks it."""

    title: str
    """Name shown in figures, as in Table 1."""
    page: str
    """Where it can be had: a section of CoOp's page, or an address."""
    folder: str
    """Folder of images under `DATA/<name>`; '' if the split file counts from there."""
    classes: int
    """Number of classes of the whole set."""
    images: tuple[int, ...]
    """Images of the whole set: train, val, test; or train, test; or test alone."""
    template: str = PHOTO
    """Zero-shot prompt (facts.md §2)."""
    split: str = ""
    """CoOp's split file, or ''."""
    drive: str = ""
    """Identifier of the split file on Google Drive, from CoOp's page."""
    rename: Callable[[str], str | None] = _same
    """Gives a class its final name, and leaves final names alone; None drops the class."""
    config: str = ""
    """Name in Dassl's configurations and in MaPLe's folders, '' where it is the folder's."""

    @property
    def remedy(self) -> str:
        """Say in a clause where to get the data set."""
        page = self.page if "://" in self.page else f"{PAGE}#{self.page}"
        if not self.split:
            return f"get it as {page} says"
        return (
            f"get it as {page} says, the split file from https://drive.google.com/file/d/{self.drive}/view"
        )


_CALTECH: dict[str, str | None] = {
    "BACKGROUND_Google": None, "Faces_easy": None, "airplanes": "airplane", "Faces": "face",
    "Leopards": "leopard", "Motorbikes": "motorbike",
}  # fmt: skip
_EUROSAT = {
    "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}  # fmt: skip


def _year_first(name: str) -> str:
    return re.sub(r"^(\D.*) (\d{4})$", r"\2 \1", name)


def _places_reversed(name: str) -> str:
    if "/" not in name:
        return name
    return " ".join(reversed(re.sub(r"^/?[a-z]/", "", name).split("/")))


def _words_apart(name: str) -> str:
    return re.sub(r"(?<=[^_])(?=[A-Z])", "_", name)


RECIPES = {
    "imagenet": Recipe("ImageNet", "imagenet", "images", 1000, (1281167, 50000)),
    "caltech-101": Recipe(
        "Caltech101", "caltech101", "101_ObjectCategories", 100, (4128, 1649, 2465),
        split="split_zhou_Caltech101.json", drive="1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
        rename=lambda name: _CALTECH.get(name, name), config="caltech101",
    ),
    "oxford_pets": Recipe(
        "OxfordPets", "oxfordpets", "images", 37, (2944, 736, 3669), "a photo of a {}, a type of pet.",
        "split_zhou_OxfordPets.json", "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs", str.lower,
    ),
    "stanford_cars": Recipe(
        "StanfordCars", "stanfordcars", "", 196, (6509, 1635, 8041),
        split="split_zhou_StanfordCars.json", drive="1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT", rename=_year_first,
    ),
    "oxford_flowers": Recipe(
        "Flowers102", "flowers102", "jpg", 102, (4093, 1633, 2463), "a photo of a {}, a type of flower.",
        "split_zhou_OxfordFlowers.json", "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
    ),
    "food-101": Recipe(
        "Food101", "food101", "images", 101, (50500, 20200, 30300), "a photo of {}, a type of food.",
        "split_zhou_Food101.json", "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl", config="food101",
    ),
    "fgvc_aircraft": Recipe(
        "FGVC Aircraft", "fgvcaircraft", "images", 100, (3334, 3333, 3333),
        "a photo of a {}, a type of aircraft.",
    ),
    "sun397": Recipe(
        "SUN397", "sun397", "SUN397", 397, (15880, 3970, 19850),
        split="split_zhou_SUN397.json", drive="1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq", rename=_places_reversed,
    ),
    "dtd": Recipe(
        "DTD", "dtd", "images", 47, (2820, 1128, 1692), "{} texture.",
        "split_zhou_DescribableTextures.json", "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
    ),
    "eurosat": Recipe(
        "EuroSAT", "eurosat", "2750", 10, (13500, 5400, 8100), "a centered satellite photo of {}.",
        "split_zhou_EuroSAT.json", "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        lambda name: _EUROSAT.get(name, name),
    ),
    "ucf101": Recipe(
        "UCF101", "ucf101", "UCF-101-midframes", 101, (7639, 1898, 3783), "a photo of a person doing {}.",
        "split_zhou_UCF101.json", "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y", _words_apart,
    ),
    "imagenetv2": Recipe(
        "ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val", 1000, (10000,)
    ),
    "imagenet-sketch": Recipe("ImageNet-Sketch", "imagenet-sketch", "images", 1000, (50889,)),
    "imagenet-adversarial": Recipe("ImageNet-A", "imagenet-a", "imagenet-a", 200, (7500,)),
    "imagenet-rendition": Recipe("ImageNet-R", "imagenet-r", "imagenet-r", 200, (30000,)),
    "cifar-100": Recipe(
        "CIFAR-100", "https://www.cs.toronto.edu/~kriz/cifar.html", "cifar-100-python", 100, (50000, 10000)
    ),
}  # fmt: skip
BENCHMARKS: tuple[str, ...] = tuple(RECIPES)[:11]
"""The eleven of the paper, in the order of Table 1."""
ROBUSTNESS: tuple[str, ...] = tuple(RECIPES)[11:15]
"""ImageNet's classes drawn from elsewhere, for testing only."""
