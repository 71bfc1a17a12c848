"""Make the two pictures that README.md shows, from the book as it is built here.

    python book/pictures.py         # book/_static/readme-explorer.png, readme-figure.png

The explorer is photographed in Chromium with a latent chosen; the figure is the chapter's own output.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root, write_atomic

EXPLORER = "book/notebooks/07_explorer.html"
FIGURE = "book/notebooks/03_localization.html", "fig-4"
BYTES = 200_000  # of one picture; a README is read on telephones
COLOURS = 192
HEIGHT = 1066  # of the part of the explorer that is shown, px


def main() -> int:
    """Make both pictures; return 0, or 2 where the book is not built."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", type=Path, default=project_root() / "_build" / "html", help="the book")
    parser.add_argument("--out", type=Path, default=project_root() / "book" / "_static")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    try:
        for page in (EXPLORER, FIGURE[0]):
            if not (given.html / page).is_file():
                raise PatchSAEError(f"'{given.html / page}' is missing: run `make book` first.")
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu"]
            browser = playwright.chromium.launch(executable_path=given.chromium, args=flags)
            page = browser.new_page(viewport={"width": 1400, "height": 3200})
            page.set_default_timeout(200_000)  # a machine may have other work
            page.goto((given.html / EXPLORER).as_uri())
            keep(given.out / "readme-explorer.png", explorer(page))
            page.goto((given.html / FIGURE[0]).as_uri())
            keep(given.out / "readme-figure.png", figure(page, FIGURE[1]))
            browser.close()
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def explorer(page) -> bytes:
    """Photograph the explorer as it opens, from its second step on: a picture, its latents, a map."""
    place = page.locator(".patchsae-explorer").first
    place.scroll_into_view_if_needed()
    page.wait_for_timeout(3000)  # blocks and pictures are read when they are seen
    down = page.get_by_text("2. Choose").first.bounding_box()["y"] - place.bounding_box()["y"]
    shot = Image.open(io.BytesIO(place.screenshot()))
    part = io.BytesIO()
    shot.crop((0, int(down), shot.width, int(down) + HEIGHT)).save(part, "png")
    return part.getvalue()


def figure(page, label: str) -> bytes:
    """Photograph the first picture of a labelled cell, or after it."""
    where = f'(//*[@id="{label}"]/descendant::img | //*[@id="{label}"]/following::img)[1]'
    return page.locator(f"xpath={where}").screenshot()


def keep(path: Path, shot: bytes) -> None:
    """Write a photograph with few colours, so that it is small."""
    picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    write_atomic(path, lambda temporary: picture.save(temporary, optimize=True))
    size = path.stat().st_size
    print(f"{path}: {picture.width} × {picture.height}, {size / 1000:.0f} kB")
    if size > BYTES:
        raise PatchSAEError(f"'{path}' has {size:,} bytes, more than {BYTES:,}: show less of the page.")


if __name__ == "__main__":
    sys.exit(main())
