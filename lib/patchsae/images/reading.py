"""One file of a person's to one RGB picture: limits before anything is decoded, and grey of any depth.

Nothing but rasters is opened: Pillow hands some other formats to programs of the machine.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from patchsae.runs.errors import PatchSAEError

VERSION = 2  # raised when the same file gives another picture
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "QOI")
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .gif .bmp .dib .webp .tif .tiff .ppm .pgm .pbm .pnm .pfm .avif "
    ".avifs .jp2 .j2k .jpc .jpf .jpx .tga .qoi".split()
)
MEGAPIXELS = 100  # of a picture, 300 MB when decoded
LONGEST = 100  # times as long as wide: resizing a strip's short side would make the long one huge


class UnreadableImage(PatchSAEError):
    """Tell that a file is missing, damaged or of another kind, rather than too large."""


def read_image(
    source: Path | str | IO[bytes], name: str, upright: bool = False, small: bool = False
) -> Image.Image:
    """Decode a file, or its content, in RGB at its own size.

    Grey of 16 or 32 bits is scaled to 8, where Pillow would cut off all that is brighter than 255.

    Parameters
    ----------
    name : what the picture is called in errors
    small : whether a photo may be decoded at an eighth of its size, to see that it can be
    upright : whether a photo is turned as its EXIF data say; models were trained on ones that are not

    Raises
    ------
    UnreadableImage : the file is missing or is no readable raster.
    PatchSAEError : more than 100 megapixels; more than 100 times as long as wide; grey of a range that
        the file does not tell.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            file = Image.open(source, formats=FORMATS)
        with file:
            _check_size(file, name)
            if small:
                file.draft("RGB", (1, 1))
            picture = ImageOps.exif_transpose(file) if upright else file
            return _rgb(picture, name, file.format == "PPM")
    except PatchSAEError:
        raise
    except Image.DecompressionBombError as error:
        raise PatchSAEError(
            f"{name} has far more than {MEGAPIXELS} megapixels: make it smaller."
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds on damaged files
        raise UnreadableImage(f"cannot read {name} ({error}); replace or remove the file.") from error


def _check_size(file: Image.Image, name: str) -> None:
    pixels, (short, long) = file.width * file.height, sorted(file.size)
    if pixels > MEGAPIXELS * 1e6:
        raise PatchSAEError(
            f"{name} has {pixels / 1e6:,.0f} megapixels, more than {MEGAPIXELS}: make it smaller."
        )
    if long > LONGEST * short:
        raise PatchSAEError(
            f"{name} is {long} pixels long and {short} wide, more than {LONGEST} times: cut out a part."
        )


def _rgb(picture: Image.Image, name: str, portable: bool) -> Image.Image:
    """Convert to RGB; `portable` are PGM and PFM, of which Pillow scales integers to 16 bits itself."""
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    grey = np.asarray(picture)
    least, most = float(grey.min()), float(grey.max())
    if picture.mode.startswith("I;16") or (portable and picture.mode == "I"):
        full = 65535.0
    elif picture.mode == "F" and 0 <= least and most <= 1:
        full = 1.0
    else:  # the file does not say which grey is white
        full = next((full for full in (255.0, 65535.0) if 0 <= least and most <= full), 0.0)
    if not full:
        raise PatchSAEError(
            f"{name} has grey values from {least:.6g} to {most:.6g}, of which the file does not say what "
            "is white: save it with 8 or 16 bits."
        )
    return Image.fromarray(np.rint(grey * (255.0 / full)).astype(np.uint8)).convert("RGB")
