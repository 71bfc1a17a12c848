"""Numbers and pictures as text that a page can read: what every block is made of."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

COLUMNS = 10  # pictures side by side on a sheet


def pack(array: np.ndarray) -> dict[str, str]:
    """Encode an array for a block: whole numbers ≥ 0 in as few bytes as hold them, others as float32."""
    if array.dtype.kind in "iub":
        largest = int(array.max(initial=0))
        kind = next(f"u{size}" for size in (1, 2, 4) if largest < 256**size)
    else:
        kind = "f4"
    content = np.ascontiguousarray(array).astype(f"<{kind}").tobytes()
    return {"t": kind, "b": base64.b64encode(content).decode()}


def unpack(packed: dict[str, str]) -> np.ndarray:
    """Decode what `pack` encoded."""
    return np.frombuffer(base64.b64decode(packed["b"]), f"<{packed['t']}")


def data_uri(picture: Image.Image, quality: int | None = None) -> str:
    """Encode a picture as WebP inside a URI, to the last bit where no quality is given."""
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=quality or 100, lossless=quality is None, exact=True)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def as_picture(pixels: Tensor) -> Image.Image:
    """Return pixels uint8 [3, H, W] as a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def sheet(pictures: Sequence[Image.Image], side: int) -> Image.Image:
    """Lay pictures out side by side, COLUMNS in a row."""
    columns = min(COLUMNS, len(pictures))
    whole = Image.new("RGB", (columns * side, -(-len(pictures) // COLUMNS) * side))
    for cell, picture in enumerate(pictures):
        place = (cell % COLUMNS * side, cell // COLUMNS * side)
        whole.paste(picture.resize((side, side), Image.Resampling.BICUBIC), place)
    return whole
