"""Benchmarks of exactly the official layouts, with a few classes and a few small JPEGs each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

# name: folder of images, split file, {class name: path of its images}; cars lie in another folder by part
SPLIT_SETS = {
    "caltech-101": ("101_ObjectCategories", "split_zhou_Caltech101.json", {
        "face": "Faces/image_{:04d}.jpg", "leopard": "Leopards/image_{:04d}.jpg",
        "crocodile_head": "crocodile_head/image_{:04d}.jpg",
    }),
    "oxford_pets": ("images", "split_zhou_OxfordPets.json", {
        "abyssinian": "Abyssinian_{}.jpg", "american_bulldog": "american_bulldog_{}.jpg",
        "bengal": "Bengal_{}.jpg",
    }),
    "stanford_cars": ("", "split_zhou_StanfordCars.json", {
        "2000 AM General Hummer SUV": "cars_PART/0{:04d}.jpg",
        "2012 Acura RL Sedan": "cars_PART/1{:04d}.jpg",
        "2012 Audi TTS Coupe": "cars_PART/2{:04d}.jpg",
    }),
    "oxford_flowers": ("jpg", "split_zhou_OxfordFlowers.json", {
        "pink primrose": "image_0{:04d}.jpg", "hard-leaved pocket orchid": "image_1{:04d}.jpg",
    }),
    "food-101": ("images", "split_zhou_Food101.json", {
        "apple_pie": "apple_pie/{}.jpg", "baby_back_ribs": "baby_back_ribs/{}.jpg",
        "baklava": "baklava/{}.jpg",
    }),
    "sun397": ("SUN397", "split_zhou_SUN397.json", {
        "abbey": "a/abbey/sun_{}.jpg", "airplane_cabin": "a/airplane_cabin/sun_{}.jpg",
        "indoor apse": "a/apse/indoor/sun_{}.jpg",
    }),
    "dtd": ("images", "split_zhou_DescribableTextures.json", {
        "banded": "banded/banded_{:04d}.jpg", "blotchy": "blotchy/blotchy_{:04d}.jpg",
        "polka-dotted": "polka-dotted/polka-dotted_{:04d}.jpg",
    }),
    "eurosat": ("2750", "split_zhou_EuroSAT.json", {
        "Annual Crop Land": "AnnualCrop/AnnualCrop_{}.jpg", "Forest": "Forest/Forest_{}.jpg",
        "Sea or Lake": "SeaLake/SeaLake_{}.jpg",
    }),
    "ucf101": ("UCF-101-midframes", "split_zhou_UCF101.json", {
        "Apply_Eye_Makeup": "Apply_Eye_Makeup/v_ApplyEyeMakeup_g{:02d}_c01.jpg",
        "Archery": "Archery/v_Archery_g{:02d}_c01.jpg", "Yo_Yo": "Yo_Yo/v_YoYo_g{:02d}_c01.jpg",
    }),
}  # fmt: skip
PER_CLASS = {"train": 3, "val": 1, "test": 2}
AIRCRAFT = {"707-320": "1025794", "A300B4": "0034309", "DC-3": "1167113", "F/A-18": "2230118"}
WNIDS = {"n01440764": "tench", "n01443537": "goldfish", "n02389026": "common sorrel horse"}


def photo(path: Path, size: tuple[int, int] = (41, 30)) -> Path:
    """Write a small JPEG whose pixels follow from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    blocks = rng.integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(blocks).resize(size).save(path, quality=90)
    return path


def split_set(data: Path, name: str) -> Path:
    """Make one of the nine sets that have a split file of CoOp's; return that file."""
    folder, file, classes = SPLIT_SETS[name]
    split: dict[str, list] = {part: [] for part in PER_CLASS}
    for label, (classname, pattern) in enumerate(classes.items()):
        number = 0
        for part, images in PER_CLASS.items():
            for _ in range(images):
                number += 1
                path = pattern.replace("PART", "test" if part == "test" else "train").format(number)
                photo(data / name / folder / path)
                split[part].append([path, label, classname])
    # the official files are not sorted by label
    for entries in split.values():
        entries.reverse()
    (data / name / file).write_text(json.dumps(split))
    return data / name / file


def aircraft(data: Path) -> Path:
    """Make FGVC Aircraft, whose official split is in text files."""
    folder = data / "fgvc_aircraft"
    for part, images in PER_CLASS.items():
        lines = []
        for label, (name, number) in enumerate(AIRCRAFT.items()):
            for i in range(images):
                image = f"{int(number) + 10 * len(part) + 100 * label + i:07d}"
                photo(folder / "images" / f"{image}.jpg")
                lines.append(f"{image} {name}")
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "variants.txt").write_text("\n".join(AIRCRAFT) + "\n")
    return folder


def imagenet(data: Path, train: int = 4, val: int = 2, backwards: bool = False) -> Path:
    """Make ImageNet with three classes and their classnames.txt; `backwards` makes the last file first."""
    folder = data / "imagenet"
    paths = [
        folder / "images" / part / wnid / f"{wnid}_{i}.JPEG"
        for part, images in (("train", train), ("val", val))
        for wnid in WNIDS
        for i in range(images)
    ]
    for path in reversed(paths) if backwards else paths:
        photo(path)
    lines = [f"{wnid} {name}" for wnid, name in WNIDS.items()]
    (folder / "classnames.txt").write_text("\n".join(lines) + "\n")
    return folder


def benchmark(data: Path, name: str) -> Path:
    """Make any of the eleven."""
    return {"imagenet": imagenet, "fgvc_aircraft": aircraft}.get(name, lambda d: split_set(d, name))(data)
