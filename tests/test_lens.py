"""The public face: a person's own pictures, any model, any SAE; and what is refused."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_ablation import save_model

import patchsae as ps
from patchsae.lens import open_images, train
from patchsae.sae.importers import export_saelens


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return ps.load_clip(save_model(tmp_path_factory.mktemp("clip")), block=1)


def draw(folder, count=10):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (90, 120 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("pictures") / "holiday")


@pytest.fixture(scope="module")
def lens(clip, photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    with pytest.warns(UserWarning, match="hardly anything was learned"):
        return ps.train(
            clip, ps.open_images(photos, clip), root, progress=False, expansion=4, token_batch=64
        )


def test_the_example_of_the_readme_on_a_flat_folder(clip, photos, lens, tmp_path):
    pictures = ps.open_images(photos, clip)
    assert len(pictures) == 10 and pictures.classnames == ("holiday",) and pictures.name == "holiday"
    found = ps.describe(lens, pictures, tmp_path, progress=False, k=3)
    assert found.atlas.sizes["latent"] == 128 and found.atlas.sizes["rank"] == 3
    alive = int(found.atlas.image_frequency.values.argmax())
    figure = ps.show(found, latent=alive, images=2)
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    figure.savefig(tmp_path / "latent.png")
    again = ps.describe(lens, pictures, tmp_path, progress=False, k=3)
    np.testing.assert_array_equal(again.atlas.top_index, found.atlas.top_index)


def test_ten_pictures_become_a_page(clip, photos, lens, tmp_path):
    pictures = ps.open_images(photos, clip)
    explorer = ps.explore(lens, pictures, tmp_path, gallery=4, progress=False)
    page = explorer.save(tmp_path / "explorer.html")
    assert page == tmp_path / "explorer.html" and page.read_text("utf-8").startswith("<!doctype html>")
    blocks = tmp_path / "explorer_files" / explorer.index["folder"]
    assert {file.name for file in blocks.iterdir()} == {file.name for file in explorer.folder.glob("*.js")}
    assert explorer.index["models"] == ["tiny"] and explorer.index["live"]
    assert [one["title"] for one in explorer.index["gallery"]] == ["holiday"] * 4
    assert explorer.index["sets"] == [{"title": "holiday", "images": 10, "shown": 10}]
    for number, index in enumerate((0, 3, 6, 9)):  # at even steps, from the first to the last
        own = explorer.add(photos / f"photo {index:02d}.png")
        found, shown = (explorer.block(f"acts-{n}-0") for n in (own, number))
        assert found["latent"] == shown["latent"]
    few = ps.explore(lens, pictures.subset([1, 4]), tmp_path, progress=False)
    assert len(few.index["gallery"]) == 2  # fewer than were asked for
    for wrong in (0, 2.5, True):
        with pytest.raises(ps.PatchSAEError, match="gallery=.* must be a whole number above 0"):
            ps.explore(lens, pictures, tmp_path, gallery=wrong)


def test_more_images_can_be_seen_than_there_are(clip, photos, tmp_path):
    pictures, options = ps.open_images(photos, clip), {"expansion": 2, "token_batch": 64, "progress": False}
    with pytest.warns(
        UserWarning,
        match=r"hardly anything.*About 3,000 steps.*images=\d{4,}, counted.*token_batch=64 .*--seen",
    ):
        once = ps.train(clip, pictures, tmp_path, images=20, **options)
    assert once.sae.d_sae == 64


def test_folders_are_classes_and_a_mixture_is_refused(clip, tmp_path):
    for name in ("cats", "dogs_of_town"):
        draw(tmp_path / "all" / name, 2)
    pictures = ps.open_images(tmp_path / "all", clip)
    assert pictures.classnames == ("cats", "dogs of town") and pictures.labels.tolist() == [0, 0, 1, 1]
    draw(tmp_path / "all", 1)
    with pytest.raises(ps.PatchSAEError, match="holds pictures and folders of pictures"):
        ps.open_images(tmp_path / "all", clip)


def test_pictures_are_framed_as_the_model_frames_them(clip, photos):
    clip.model.visual.preprocess_cfg = {"resize_mode": "squash", "interpolation": "bilinear"}
    try:
        squashed = open_images(photos, clip).load([0]).images
    finally:
        del clip.model.visual.preprocess_cfg
    with Image.open(photos / "photo 00.png") as file:
        wanted = file.resize((112, 112), Image.Resampling.BILINEAR)
    assert torch.equal(squashed[0], torch.from_numpy(np.array(wanted)).permute(2, 0, 1))


def test_an_autoencoder_comes_from_a_folder_or_another_project(clip, lens, tmp_path):
    lens.sae.save(tmp_path / "own")
    own = ps.load_sae(tmp_path / "own", clip)
    assert torch.equal(own.sae.W_dec, lens.sae.W_dec) and own.name == str(tmp_path / "own")
    export_saelens(lens.sae, tmp_path / "lens")
    theirs = ps.load_sae(tmp_path / "lens", clip)
    x = torch.randn(5, 32)
    torch.testing.assert_close(theirs.sae(x), lens.sae(x), rtol=1e-4, atol=1e-5)


def test_an_autoencoder_of_another_block_is_refused_and_of_another_model_warned_of(clip, lens, tmp_path):
    folder = lens.sae.save(tmp_path / "own")
    card = {"block": clip.block, "backbone": {"fingerprint": clip.fingerprint()}}
    (folder / "card.json").write_text(json.dumps(card))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ps.load_sae(folder, clip)
        ps.load_sae(lens.name, clip)  # as trained, with a manifest
    with pytest.raises(ps.PatchSAEError, match=f"of block {clip.block}, and the model is cut after 0"):
        ps.load_sae(folder, clip.at_block(0))
    with pytest.warns(UserWarning, match="was trained on the tokens of another model, or of another block"):
        ps.load_sae(lens.name, clip.at_block(0))
    for damaged in ("", "[1]", '{"block": "x", "backbone": 3}'):
        (folder / "card.json").write_text(damaged)
        assert ps.load_sae(folder, clip).sae.d_sae == lens.sae.d_sae


def test_what_cannot_be_is_one_sentence(clip, photos, lens, tmp_path, monkeypatch):
    def refused(match, call, *arguments, **options):
        with pytest.raises(ps.PatchSAEError, match=match) as raised:
            call(*arguments, **options)
        assert "\n" not in str(raised.value)

    (tmp_path / "empty").mkdir()
    refused("there is no folder", ps.open_images, tmp_path / "none", clip)
    refused("no images under", ps.open_images, tmp_path / "empty", clip)
    refused("there is no file or folder", ps.load_sae, tmp_path / "none", clip)
    refused("train has no parameter 'expansoin'; there are .*expansion", train, clip, None, expansoin=4)
    wide = ps.SAE(ps.SAEConfig(d_in=16, expansion=2))
    wide.save(tmp_path / "wide")
    refused("of width 16, the tokens of tiny of 32", ps.load_sae, tmp_path / "wide", clip)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("could not be fetched from the Hugging Face hub", ps.load_sae, "hf:nobody/nothing-here", clip)
    one = ps.open_images(draw(tmp_path / "one", 1), clip)
    refused("'one' has 1 picture, of which nothing can be learned: give at least 2", ps.train, clip, one)
    found = ps.describe(lens, one, tmp_path, progress=False)
    refused("latent=999 is none of the 128", ps.show, found, 999)
    silent = int(found.atlas.image_frequency.values.argmin())
    if not found.atlas.image_frequency[silent]:
        refused(f"latent {silent} fires on no image", ps.show, found, silent)
    refused("describe has no parameter 'taw'", ps.describe, lens, one, tmp_path, taw=1)
    refused("k=5 references were asked for, but 'one' has 1 images", ps.describe, lens, one, tmp_path, k=5)


def test_importing_the_package_loads_no_torch_and_names_are_few():
    code = "import sys, patchsae; assert 'torch' not in sys.modules; print(*dir(patchsae))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(told.stdout.split()) <= 13
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ps.nonsense
    assert all(getattr(ps, name) for name in ps.__all__)
