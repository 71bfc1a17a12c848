"""A tower's pass with float32 products by oneDNN against torch's own choice, MKL.

One thread, a few images at a time as a chapter runs them; both ways take turns. Where oneDNN would round,
or knows no more of the processor than MKL, the ratio is 1.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from measure import Row, row, say

from patchsae.clip.backbone import Backbone, load_backbone
from patchsae.runs.products import fast_float32
from patchsae.runs.stage import project_root

IMAGES, ROUNDS = 16, 8
MODELS = (str(project_root() / "artefacts" / "small_clip"), "ViT-B-16-quickgelu")


def plain(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """Send images through the tower with the products that torch chooses."""
    tokens = backbone.in_parts(
        lambda part: backbone.tower.run(backbone.tower.embed(part), 0, backbone.n_blocks), images
    )
    return backbone.tower.pool(tokens)


@torch.no_grad()
def run() -> list[Row]:
    """Measure each model's images per second both ways."""
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for name in MODELS:
            backbone = load_backbone(name, block=11)
            images = torch.randn(IMAGES, 3, backbone.image_size, backbone.image_size)
            ways = {"oneDNN": fast_float32()(plain), "MKL": plain}
            found = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way, call in ways.items():
                    started = time.perf_counter()
                    call(backbone, images)
                    found[way].append(IMAGES / (time.perf_counter() - started))
            own, other = (median(speeds) for speeds in found.values())
            ratios = [a / b for a, b in zip(*found.values(), strict=True)]
            say(f"{backbone.name}: {own:.1f} and {other:.1f} images/s")
            rows.append(row(f"tower pass of {backbone.name}", own, other, "MKL", "images/s", ratios, None))
    finally:
        torch.set_num_threads(threads)
    return rows
