"""The page that `save` writes and the command makes: one model, opened from disk in a browser."""

import os
import re
import shutil

import numpy as np
import pytest
from test_ablation import save_model
from test_explorer_browser import click_patch, drawn, part, pixels
from test_lens import draw
from tiny_explorer import sparse_sae

import patchsae as ps
from patchsae.command import main
from patchsae.explorer.blocks import read_activations, read_block
from patchsae.explorer.data import group_latents, image_values
from patchsae.explorer.packing import unpack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Lay out what a person has: a model, a trained autoencoder of it, ten pictures."""
    root = tmp_path_factory.mktemp("mine")
    save_model(root)
    sparse_sae(32).save(root / "sae")
    draw(root / "pictures")
    return root


@pytest.fixture(scope="module")
def explorer(folder):
    clip = ps.load_clip(str(folder / "tiny"), block=1)
    lens, pictures = ps.load_sae(folder / "sae", clip), ps.open_images(folder / "pictures", clip)
    return ps.explore(lens, pictures, folder / "results", gallery=4, progress=False)


@pytest.fixture
def page(visit, explorer, tmp_path):
    """Open the saved page, of a name that an address must quote; nothing may go wrong in it."""
    opened, wrong = visit(explorer.save(tmp_path / "page #1 of mine.html"), width=1280)
    opened.set_default_timeout(10_000)
    drawn(opened)
    yield opened
    assert wrong == []


def listed(page) -> list[tuple[int, float]]:
    buttons = part(page, "clip").locator("button").all()
    return [(int(b.get_attribute("data-latent")), float(b.get_attribute("data-value"))) for b in buttons]


def test_a_saved_page_of_one_model_answers_every_control(page, explorer):
    seen, latents = read_activations(explorer.folder, 0, 0), explorer.index["latents"]
    left_out = unpack(read_block(explorer.folder, "latents")["left_out"]).astype(bool)
    whole = group_latents(seen, None, left_out).only_clip
    assert listed(page) == [(s, float(np.float32(v))) for s, v in whole]
    number = click_patch(page, 2, 3, explorer.index["grid"])["patch"]
    both = group_latents(seen, None, left_out, number).only_clip
    assert listed(page) == [(s, float(np.float32(v))) for s, v in both] and both != whole
    before = pixels(page, "map-clip", "bars-image", "scatter")
    part(page, "clip").locator("button").nth(1).click()
    latent = drawn(page)["latent"]
    assert latent == both[1][0]
    after = pixels(page, "map-clip", "bars-image", "scatter")
    assert all(a != b for a, b in zip(before, after, strict=True))
    caption = re.fullmatch(r"tiny: image (\S+), patch \S+", part(page, "caption-clip").inner_text())
    assert float(caption[1]) == pytest.approx(image_values(seen, latents)[latent], rel=0.01)
    assert page.locator(".px .references figure").count()
    page.locator(".px .thumbnail").nth(3).click()
    assert drawn(page)["image"] == 3 and page.locator(".px .thumbnail").count() == 4


def test_bars_of_one_model_choose_a_latent(page):
    first = listed(page)[0][0]
    page.evaluate("""() => { const c = document.querySelector('[data-part="bars-image"]');
      const { x, y } = c.getBoundingClientRect();
      for (let at = 60; at < c.clientWidth - 4; at += 5)
        c.dispatchEvent(new MouseEvent('click', {clientX: x + at, clientY: y + 70, bubbles: true})); }""")
    assert drawn(page)["latent"] != first


def test_a_reader_of_one_model_is_not_told_of_two(page, explorer):
    text = page.locator("body").inner_text()
    assert not re.search("CLIP|adapted|Common|Only [A-Z]|either|both|models", text)
    assert page.title() == "Latents of tiny" and "under tiny" in text
    assert page.locator("h1").inner_text() == "Latents of tiny"
    for absent in ("model", "common", "adapted", "map-adapted"):
        assert part(page, absent).count() == 0
    assert part(page, "legend").locator("span").all_inner_texts() == ["Strongest latents", "not listed"]
    assert part(page, "title-clip").inner_text() == f"Strongest latents ({len(listed(page))})"


@pytest.mark.parametrize("width", [400, 1280])
def test_the_saved_page_fits(page, width, explorer):
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(300)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    boxes = [canvas.bounding_box() for canvas in page.locator(".px canvas").all()]
    assert len(boxes) > 5 and all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


def test_a_page_without_its_folder_says_so(browser, explorer, tmp_path):
    path = explorer.save(tmp_path / "alone.html")
    shutil.rmtree(tmp_path / "alone_files")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_function("() => document.querySelector('.px [data-part=message].wrong')")
    assert "bring the folder that was saved with it" in part(page, "message").inner_text()
    page.close()


def test_saving_again_keeps_only_what_the_page_loads(explorer, tmp_path):
    path = explorer.save(tmp_path / "sub" / "page.html")
    assert path == tmp_path / "sub" / "page.html" and path.read_text("utf-8").startswith("<!doctype html>")
    copied = tmp_path / "sub" / "page_files" / explorer.index["folder"]
    times = {file.name: file.stat().st_mtime_ns for file in copied.iterdir()}
    assert set(times) == {file.name for file in explorer.folder.glob("*.js")}
    old, mine = copied.with_name("explorer-0123456789ab"), copied.with_name("x")
    text = path.read_text("utf-8")
    assert str(explorer.folder.parents[1]) not in text and "http" not in text  # no path of this machine
    for other in (old, mine):
        other.mkdir()
    explorer.save(path)
    assert {file.name: file.stat().st_mtime_ns for file in copied.iterdir()} == times
    assert mine.is_dir() and not old.exists() and path.read_text("utf-8") == text
    assert {file.name for file in path.parent.iterdir()} == {"page.html", "page_files"}


def test_where_no_page_can_be_saved_is_said(explorer, folder, tmp_path):
    for wrong in (tmp_path, tmp_path / "page", tmp_path / "page.txt"):
        with pytest.raises(ps.PatchSAEError, match="give a file that ends in .html"):
            explorer.save(wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(ps.PatchSAEError, match="Could not write"):
        explorer.save(tmp_path / "file" / "page.html")
    shutil.copytree(explorer.folder, tmp_path / "blocks", ignore=shutil.ignore_patterns("*.js"))
    with pytest.raises(ps.PatchSAEError, match="holds no blocks any more"):
        type(explorer)(tmp_path / "blocks").save(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def command(folder, out, *more) -> list[str]:
    given = {"images": folder / "pictures", "model": folder / "tiny", "block": 1}
    given |= {"results": folder / "results", "out": out, "gallery": 2}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return ["explore", *words, "--quiet", *more]


def test_the_command_makes_a_page_of_files(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(command(folder, out, "--sae", str(folder / "sae"))) == 0
    assert f"128 latents on 10 pictures: open {out.as_uri()}" in capsys.readouterr().out
    (blocks,) = (tmp_path / "page_files").iterdir()
    assert len(list(blocks.glob("acts-*-0.js"))) == 2
    trained = command(folder, tmp_path / "trained.html", "--expansion", "2", "--seen", "20", "--seed", "1")
    with pytest.warns(UserWarning, match="hardly anything was learned"):
        assert main(trained) == 0
    assert "64 latents on 10 pictures" in capsys.readouterr().out and (tmp_path / "trained.html").is_file()


def test_bad_input_of_the_command_is_one_sentence(folder, tmp_path, capsys):
    def refused(*more):
        assert main(command(folder, tmp_path / "page.html", *more)) == 2
        told = capsys.readouterr()
        assert told.err.startswith("error: ") and told.err.count("\n") == 1 and not told.out
        return told.err

    sae = ("--sae", str(folder / "sae"))
    assert "no name of a page" in refused("--out", str(tmp_path / "page.pdf"))
    assert "there is no folder" in refused(*sae, "--images", str(tmp_path / "none"))
    assert "alone has random weights: give --pretrained" in refused("--model", "ViT-B-16")
    assert "block 7 is outside" in refused(*sae, "--block", "7")
    assert "there is no file or folder" in refused("--sae", str(tmp_path / "none"))
    assert "--token-batch is for training" in refused(*sae, "--token-batch", "64")
    assert "gallery=0 must be a whole number above 0" in refused(*sae, "--gallery", "0")
    assert "device 'tpu' is not available" in refused(*sae, "--device", "tpu")
    assert "expansion=-1.0" in refused("--expansion", "-1")
    assert os.listdir(tmp_path) == []
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["explore"])
    assert left.value.code == 2
