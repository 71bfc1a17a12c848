"""The explorer in JupyterLab with a live kernel: every control, images of the user's, what is no image."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from test_explorer import stored
from test_explorer_browser import REFERENCES, click_patch, drawn, lists, part, pixels
from tiny_explorer import make_parts

from patchsae.explorer.data import group_latents

CODE = """import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_explorer import make_parts
make_parts(Path({root!r})).explorer()"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def lab(parts, tmp_path):
    """Start JupyterLab on a free port beside a notebook that shows the explorer; return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = CODE.format(tests=str(Path(__file__).parent), root=str(parts.folder.parent))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = new_notebook(cells=[new_code_cell(code)], metadata=kernel)
    nbformat.write(notebook, tmp_path / "explorer.ipynb")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--allow-root"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    command += ["--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0"]
    settings = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "RUNTIME")}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def test_jupyterlab_answers_every_control_and_shows_images_of_the_users(lab, parts, browser, tmp_path):
    pixel_files = []
    for image in (2, 4):
        file = tmp_path / f"own{image}.png"
        Image.fromarray(parts.gallery.load([image]).images[0].permute(1, 2, 0).numpy()).save(file)
        pixel_files.append(file)
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(f"{lab}/lab/tree/explorer.ipynb")
    page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_selector(".px[data-drawn]", timeout=60_000)
    drawn(page)
    left_out = parts.sets[0].atlas.image_frequency_tau.values > 0.5

    def same_as_static(image, patch):
        groups = group_latents(stored(parts, image, 0), stored(parts, image, 1), left_out, patch)
        for found, group in zip(lists(page).values(), groups, strict=True):
            assert [s for s, _ in found] == [s for s, _ in group]
            np.testing.assert_allclose([v for _, v in found], [v for _, v in group], rtol=1e-4)

    same_as_static(0, None)
    button = part(page, "common").locator("button").nth(1)
    latent = int(button.get_attribute("data-latent"))
    button.click()
    assert drawn(page)["latent"] == latent and part(page, "heading").inner_text() == f"Latent {latent}"
    seen = [pixels(page, "map-clip")]
    for key in ("ArrowLeft", "ArrowLeft", "Home"):  # JupyterLab's own keys, were they not kept from it
        part(page, "opacity").press(key)
        drawn(page)
        seen.append(pixels(page, "map-clip"))
    assert all(a != b for a, b in pairwise(seen))
    masked = page.evaluate(REFERENCES)
    part(page, "mask").uncheck()
    assert drawn(page)["mask"] is False and page.evaluate(REFERENCES) != masked
    part(page, "model").focus()
    page.keyboard.press("ArrowDown")
    assert drawn(page)["adapted"] == 2
    assert part(page, "title-adapted").inner_text().startswith("Only Fine-tuned")
    part(page, "model").select_option("1")
    drawn(page)
    gallery = len(parts.gallery)
    part(page, "path").fill(str(pixel_files[0]))
    part(page, "open").locator("button").click()
    assert drawn(page)["image"] == gallery
    same_as_static(2, None)
    patch = click_patch(page, 2, 3, parts.models[0].backbone.grid)["patch"]
    same_as_static(2, patch)
    before = pixels(page, "image")
    part(page, "file").set_input_files(pixel_files[1])
    assert drawn(page)["image"] == gallery + 1
    assert pixels(page, "image") != before
    same_as_static(4, None)

    wrong = tmp_path / "wrong.png"
    wrong.write_text("no image")
    part(page, "file").set_input_files(wrong)
    page.wait_for_function("""() => document.querySelector('[data-part="message"].wrong')""")
    assert "no image that can be read" in part(page, "message").inner_text()
    # 30 megapixels of noise are too much for one message: the browser reduces them
    noise = np.random.default_rng(0).integers(0, 256, (5000, 6000, 3), np.uint8)
    large = tmp_path / "large.jpg"
    Image.fromarray(noise).save(large, quality=80)
    assert large.stat().st_size > 6e6
    part(page, "file").set_input_files(large)
    assert drawn(page)["image"] == gallery + 2
    assert "6000 × 5000 pixels, reduced to 2048 × 1707" in part(page, "message").inner_text()
    page.locator(".px .thumbnail").first.click()
    assert drawn(page)["image"] == 0
    same_as_static(0, None)
    if folder := os.environ.get("PATCHSAE_SHOTS"):
        page.screenshot(path=f"{folder}/lab.png")
    page.close()
