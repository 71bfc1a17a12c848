"""The model in the page against torch on test images, and how long it takes there.

Prints the share of images whose first class is torch's, with the book's classes and with typed ones, the
largest relative difference of embeddings, and milliseconds and memory in Chromium; run it where nothing
else runs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import CHROMIUM, FLAGS  # noqa: E402
from engine_page import Asked, png, write_page  # noqa: E402

from patchbook.scales import scale  # noqa: E402
from patchsae.adaptation.prompt_files import find_prompts  # noqa: E402
from patchsae.clip.backbone import zero_shot_logits  # noqa: E402
from patchsae.explorer.answers import class_vectors  # noqa: E402
from patchsae.explorer.gallery import Shown  # noqa: E402
from patchsae.explorer.weights import write_model  # noqa: E402
from patchsae.runs.stage import project_root  # noqa: E402
from patchsae.sae.model import SAE  # noqa: E402

TEMPLATE = "a photo of a {}."
SLIDER = """async () => { const took = []; for (let i = 0; i < 20; i++) { const began = performance.now();
  await engine.answer(0, 0, { rest: i / 20 }, { group: 0 }); took.push(performance.now() - began); }
  return took.sort((a, b) => a - b); }"""
LONG = """() => { window.long = [];
  new PerformanceObserver((list) => window.long.push(...list.getEntries().map((e) => e.duration)))
    .observe({ type: "longtask" }); }"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    count = parser.parse_args().images
    clip = scale("embedded").backbone(block=11)
    sets, artefacts = scale("embedded").sets(clip, ""), project_root() / "artefacts"
    maple = find_prompts(artefacts / "prompts", "twemoji_clothing", clip, 1)
    images, names = sets.test.sample(count, 0), list(sets.test.classnames)
    shown = [Shown("CLIP", clip), Shown("MaPLe", maple)]
    texts = [class_vectors(one.backbone, names, [TEMPLATE]) for one in shown]
    with tempfile.TemporaryDirectory() as root, sync_playwright() as playwright:
        folder = Path(root) / "explorer-0"
        folder.mkdir()
        entry, why = write_model(folder, SAE.load(artefacts / "sae" / "main"), shown, [texts])
        print(why or entry)
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = browser.new_page()
        blank = renderers()
        page.goto(write_page(folder).as_uri())
        page.evaluate(LONG)
        asked, began = Asked(page), time.perf_counter()
        same, worst, typed = np.zeros((count, 2), bool), 0.0, np.zeros((count, 2), bool)
        own = [asked("texts", m, names, [TEMPLATE])["vectors"].reshape(len(names), -1) for m in (0, 1)]
        print(f"{len(names)} typed classes, twice: {time.perf_counter() - began:.1f} s with loading")
        for number in range(count):
            picture = images.load([number]).images
            asked.open(number, png(picture[0].permute(1, 2, 0).numpy()))
            for m, (_, backbone) in enumerate(shown):
                found = asked("embedding", number, m, None).copy()
                with torch.no_grad():
                    true = backbone(backbone.normalize(picture))
                first = int(zero_shot_logits(backbone, true, texts[m]).argmax())
                worst = max(worst, float((torch.from_numpy(found) - true[0]).norm() / true.norm()))
                same[number, m] = int((found @ texts[m].numpy().T).argmax()) == first
                typed[number, m] = int((found @ own[m].T).argmax()) == first
            asked("forget", number)
        picture = png(images.load([0]).images[0].permute(1, 2, 0).numpy())
        took = []
        for key in range(5):
            began = time.perf_counter()
            asked.open(key, picture)
            asked("answer", key, 0, {}, {"group": 0})
            asked("answer", key, 1, {}, {"group": 0})
            took.append(time.perf_counter() - began)
        slider = page.evaluate(SLIDER)
        print(f"same first class: {same.mean(0)}, with typed classes {typed.mean(0)}, of {count} images")
        print(f"largest relative difference of an embedding: {worst:.1e}")
        print(f"own picture to both answers: {min(took):.2f} s at best, {np.median(took):.2f} s median")
        print(f"slider step: {slider[0]:.0f} ms at best, {slider[10]:.0f} ms median")
        print(
            f"longest task of the main thread: {max(page.evaluate('() => window.long'), default=0):.0f} ms"
        )
        print(f"memory of the page beside a blank one: {(renderers() - blank) / 1e6:.0f} MB")
        browser.close()


def renderers() -> int:
    """Return the bytes that Chromium's page processes hold for themselves alone."""
    below = psutil.Process().children(recursive=True)
    return sum(one.memory_full_info().uss for one in below if "--type=renderer" in one.cmdline())


if __name__ == "__main__":
    main()
