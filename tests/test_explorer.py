"""What the explorer shows, against direct computation; bad input; static and live."""

import importlib.util
import io
import json

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from test_notebooks import photographs, text_of  # noqa: F401
from tiny_explorer import HASH, make_parts, sparse_sae, tiny_atlas, tuned

from patchbook.run import run_notebook
from patchsae.explorer import Explorer, ExplorerConfig, Shown, write_blocks
from patchsae.explorer.blocks import LIMIT, read_activations, read_block
from patchsae.explorer.data import (
    Activations,
    fires_on_nearly_everything,
    group_latents,
    image_values,
    patch_map,
    patch_values,
)
from patchsae.explorer.packing import pack, unpack
from patchsae.explorer.widget import read_picture
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root
from patchsae.training.activations import Tokens, token_columns


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("explorer"))


def stored(parts, image: int, model: int) -> Activations:
    return read_activations(parts.folder, image, model)


@torch.no_grad()
def directly(parts, image: int, model: int) -> np.ndarray:
    """Encode one image densely: [CLS and patches, latents]."""
    backbone = parts.models[model].backbone
    x = backbone.residual(backbone.normalize(parts.gallery.load([image]).images))
    return parts.sae.encode(x[0, token_columns(backbone, Tokens.ALL)]).numpy()


@pytest.mark.parametrize("model", [0, 1, 2])
def test_every_activation_is_that_of_the_dense_sae(parts, model):
    latents, patches = parts.sae.d_sae, int(np.prod(parts.models[0].backbone.grid))
    for image in range(len(parts.gallery)):
        f, found = directly(parts, image, model), stored(parts, image, model)
        np.testing.assert_allclose(image_values(found, latents), f.mean(0), rtol=1e-4, atol=1e-5)
        maps = np.stack([patch_map(found, s, patches) for s in range(latents)], 1)
        np.testing.assert_allclose(maps, f[1:], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(patch_values(found, 13, latents), maps[13])


def test_image_level_activations_are_those_of_the_atlas(parts):
    atlas = parts.sets[0].atlas  # the gallery is its first images
    for image in range(len(parts.gallery)):
        values = image_values(stored(parts, image, 0), parts.sae.d_sae)
        latents = atlas.image_latent.values[image]
        np.testing.assert_allclose(values[latents], atlas.image_value.values[image], rtol=1e-4)


@pytest.mark.parametrize("patch", [None, 0, 24])
def test_groups_follow_the_stated_rule(parts, patch):
    left_out = parts.sets[0].atlas.image_frequency_tau.values > 0.5
    assert 0 < left_out.sum() < len(left_out)
    np.testing.assert_array_equal(unpack(read_block(parts.folder, "latents")["left_out"]), left_out)
    exclusive = 0
    for image in range(len(parts.gallery)):
        tops, best = [], []
        for model in (0, 2):
            f = np.where(left_out, 0, directly(parts, image, model))
            rows = [f.mean(0)] + ([] if patch is None else [f[1 + patch]])
            tops.append({s for row in rows for s in np.argsort(-row)[:5].tolist() if row[s] > 0})
            best.append(np.max(rows, 0))
        groups = group_latents(stored(parts, image, 0), stored(parts, image, 2), left_out, patch)
        expected = tops[0] & tops[1], tops[0] - tops[1], tops[1] - tops[0]
        values = np.maximum(*best), *best
        for group, members, value in zip(groups, expected, values, strict=True):
            assert {s for s, _ in group} == members
            assert [v for _, v in group] == sorted((v for _, v in group), reverse=True)
            np.testing.assert_allclose([v for _, v in group], [value[s] for s, _ in group], rtol=1e-4)
        exclusive += len(groups.only_clip) + len(groups.only_adapted)
    assert exclusive


@pytest.mark.parametrize("patch", [None, 24])
def test_one_model_alone_has_one_list_and_its_activations_alone(parts, tmp_path, patch):
    one, gallery = parts.models[:1], [("General", parts.gallery.subset([0, 1]))]
    folder = write_blocks(parts.sae, HASH, one, gallery, parts.sets, tmp_path, progress=False)
    assert {path.stem for path in folder.glob("acts-*.js")} == {"acts-0-0", "acts-1-0"}
    explorer = Explorer(folder, parts.sae, HASH, one)
    assert explorer.index["models"] == ["CLIP"] and explorer.index["live"] and not explorer.index["notices"]
    left_out = parts.sets[0].atlas.image_frequency_tau.values > 0.5
    for image in range(2):
        found = read_activations(folder, image, 0)
        for field, value in found._asdict().items():
            np.testing.assert_allclose(value, getattr(stored(parts, image, 0), field), rtol=1e-5)
        f = np.where(left_out, 0, directly(parts, image, 0))
        rows = [f.mean(0)] + ([] if patch is None else [f[1 + patch]])
        top = {s for row in rows for s in np.argsort(-row)[:5].tolist() if row[s] > 0}
        common, alone, adapted = group_latents(found, None, left_out, patch)
        assert {s for s, _ in alone} == top and not common and not adapted
        np.testing.assert_allclose([v for _, v in alone], sorted(np.max(rows, 0)[[*top]])[::-1], rtol=1e-4)
    (notice,) = Explorer(folder, parts.sae, HASH, parts.models).index["notices"]
    assert "models given are not those" in notice


def test_statistics_and_references_are_those_of_the_atlases(parts):
    atlas, latents = parts.sets[0].atlas, read_block(parts.folder, "latents")
    for name in ("image_frequency", "mean_activation", "entropy", "label_std"):
        np.testing.assert_array_equal(unpack(latents[name]), atlas[name].values.astype(np.float32))
    patches = int(np.prod(parts.models[0].backbone.grid))
    for number, one in enumerate(parts.sets):
        block = read_block(parts.folder, "refs-1")["sets"][number]
        arrays = {name: unpack(packed) for name, packed in block.items()}
        first, k = 64, 4
        for s in range(first, parts.sae.d_sae):
            rows = slice((s - first) * k, (s - first) * k + k)
            column = one.atlas.isel(latent=s)
            shown = column.top_value.values[:k] > 0
            np.testing.assert_array_equal(arrays["cell"][rows] > 0, shown)
            np.testing.assert_array_equal(arrays["value"][rows][shown], column.top_value.values[:k][shown])
            np.testing.assert_array_equal(arrays["label"][rows][shown], column.top_label.values[:k][shown])
            if not shown.any():
                continue
            # weights are shares of the strongest patch of the row
            with torch.no_grad():
                clip, images = parts.models[0].backbone, one.images.load(column.top_index.values[:k][shown])
                f = parts.sae.encode(clip.residual(clip.normalize(images.images)))[:, 1:, s].numpy()
            weights = np.zeros((k, patches))
            for r in range(k):
                entries = slice(*arrays["start"][rows.start + r : rows.start + r + 2])
                weights[r, arrays["patch"][entries]] = arrays["weight"][entries] / 255
            np.testing.assert_allclose(weights[shown], f / max(f.max(), 1e-12), atol=0.51 / 255)


def test_numbers_survive_packing():
    for array in (np.array([0, 255]), np.array([0, 256]), np.array([70000]), np.array([], int)):
        np.testing.assert_array_equal(unpack(pack(array)), array)
    exact = np.random.default_rng(0).random(50).astype(np.float32)
    np.testing.assert_array_equal(unpack(pack(exact)), exact)


def test_a_killed_run_goes_on_and_a_finished_one_does_nothing(parts):
    again = [("General", parts.gallery)]
    files = {path: path.read_bytes() for path in parts.folder.glob("*.js")}
    times = {path: path.stat().st_mtime_ns for path in files}
    lost = parts.folder / "acts-3-1.js"
    lost.unlink()
    (parts.folder / "manifest.json").unlink()
    root = parts.folder.parent
    for _ in range(2):
        folder = write_blocks(parts.sae, HASH, parts.models, again, parts.sets, root, progress=False)
        assert folder == parts.folder
        assert {path: path.read_bytes() for path in folder.glob("*.js")} == files
    # the model's own files are made in one go, and again
    own = ("engine", "tower-", "words-", "vectors-")
    changed = [path for path in files if path.stat().st_mtime_ns != times[path]]
    assert [path for path in changed if not path.stem.startswith(own)] == [lost]


def test_blocks_and_page_are_small(parts):
    assert max(path.stat().st_size for path in parts.folder.glob("*.js")) < LIMIT == 2_000_000
    html = parts.explorer().html()
    assert len(html.encode()) < 100_000
    assert html.count("</script>") == 1 and "http" not in html
    assert html == parts.explorer().html()


def test_static_and_live_have_the_same_numbers_for_the_same_image(parts, tmp_path):
    explorer = parts.explorer()
    for image in range(2):
        file = tmp_path / f"{image}.png"
        pixels = parts.gallery.load([image]).images[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file)
        by_path, by_upload = explorer.add(file), explorer.add(file.read_bytes(), "a.png")
        for model in range(3):
            static = explorer.block(f"acts-{image}-{model}")
            assert static == read_block(parts.folder, f"acts-{image}-{model}")
            live = explorer.block(f"acts-{by_path}-{model}")
            assert live == explorer.block(f"acts-{by_upload}-{model}")
            for name in Activations._fields:
                np.testing.assert_allclose(unpack(live[name]), unpack(static[name]), rtol=1e-5)


class Heard(list):
    """What a live explorer says to its page."""

    def __init__(self, explorer, monkeypatch):
        monkeypatch.setattr(explorer, "send", self.append)
        self.explorer = explorer

    def ask(self, content, *buffers):
        self.explorer._answer(self.explorer, content, list(buffers))
        return self[-1]


def test_bad_input_becomes_a_message_and_the_widget_goes_on(parts, tmp_path, monkeypatch):
    heard = Heard(explorer := parts.explorer(), monkeypatch)
    assert "no image that can be read" in heard.ask({"upload": "x.png"}, memoryview(b"no image"))["problem"]
    assert "There is no file" in heard.ask({"path": str(tmp_path / "none.png")})["problem"]
    assert "no file" in heard.ask({"path": str(tmp_path)})["problem"]
    assert "cannot be read" in heard.ask({"want": "acts-99-0"})["failed"]
    assert "cannot be read" in heard.ask({"want": "../index"})["failed"]
    assert "Error" in heard.ask({"upload": "x.png"})["problem"]  # no content at all
    large = tmp_path / "large.png"
    Image.new("RGB", (6000, 5000), (9, 99, 200)).save(large, compress_level=1)
    assert "6000 × 5000 pixels, resized" in heard.ask({"path": str(large)})["added"]["note"]
    number = heard[-1]["added"]["number"]
    assert heard.ask({"want": f"acts-{number}-1"})["data"]["mean"]["b"]
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 6_000)).save(huge)
    assert "120 megapixels, more than 100" in heard.ask({"path": str(huge)})["problem"]
    Image.new("1", (30_000, 7_000)).save(huge)  # Pillow itself refuses this one
    assert "more than 100 megapixels" in heard.ask({"path": str(huge)})["problem"]
    Image.new("1", (50_000, 1)).save(huge)  # 5.6 million pixels wide, were its height CLIP's
    assert "50000 pixels long and 1 wide" in heard.ask({"path": str(huge)})["problem"]
    assert heard.ask({"want": "acts-0-0"})["data"] == explorer.block("acts-0-0")


def test_a_photo_is_turned_as_its_exif_data_say(tmp_path):
    upright = Image.new("RGB", (40, 20))
    upright.paste((255, 0, 0), (0, 0, 20, 20))
    turned, tags = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    tags[0x0112] = 6  # shown turned clockwise
    turned.save(tmp_path / "phone.png", exif=tags)
    for source in (tmp_path / "phone.png", (tmp_path / "phone.png").read_bytes()):
        picture, _ = read_picture(source)
        assert picture.tobytes() == upright.tobytes() and picture.size == (40, 20)


def test_a_view_opened_later_knows_the_images_added_before(parts):
    explorer, content = parts.explorer(), io.BytesIO()
    Image.new("RGB", (60, 50), (200, 30, 30)).save(content, "PNG")
    assert explorer.add(content.getvalue(), "mine.png") == len(explorer.index["gallery"])
    assert explorer.index["own"] == [{"title": "mine.png", "set": "your images"}]
    assert '"own": []' in explorer.html()  # a page has no kernel to ask for it


def test_an_atlas_of_another_sae_is_named_and_the_rest_goes_on(parts, tmp_path):
    clip = parts.models[0].backbone
    wrong = tiny_atlas(parts.sae, clip, parts.sets[0].images, tmp_path, "sae-another")
    gallery = [("General", parts.gallery.subset([0]))]

    def shown(sets):
        return Explorer(
            write_blocks(parts.sae, HASH, parts.models, gallery, sets, tmp_path, progress=False)
        )

    explorer = shown([parts.sets[0]._replace(atlas=wrong), parts.sets[1]])
    (notice,) = explorer.index["notices"]
    assert f"The atlas of 'tiny' describes sae-another, not {HASH}" in notice
    assert [one["title"] for one in explorer.index["sets"]] == ["Sketches"]
    assert explorer.index["general"] is None and "image_frequency" not in explorer.block("latents")
    assert not unpack(explorer.block("latents")["left_out"]).any()
    assert explorer.block("acts-0-0")
    same_name = sparse_sae(clip.d_model)
    same_name.b_enc.data[3] += 1e-6
    changed = tiny_atlas(same_name, clip, parts.sets[0].images, tmp_path)
    (notice,) = shown([parts.sets[0]._replace(atlas=changed)]).index["notices"]
    assert "other weights" in notice
    assert "only the gallery" in Explorer(parts.folder, same_name, HASH, parts.models).index["notices"][0]
    of_maple = tiny_atlas(parts.sae, parts.models[1].backbone, parts.sets[0].images, tmp_path)
    (notice,) = shown([parts.sets[0]._replace(atlas=of_maple)]).index["notices"]
    assert "made with another model" in notice
    (notice,) = shown([parts.sets[0]._replace(images=parts.gallery)]).index["notices"]
    assert "describes 40 images that are not the 6 given" in notice


def test_another_sae_leaves_the_gallery_and_says_so(parts):
    explorer = Explorer(parts.folder, parts.sae, "sae-another", parts.models)
    assert "only the gallery can be picked" in explorer.index["notices"][0] and not explorer.index["live"]
    assert explorer.block("acts-0-0")
    with pytest.raises(PatchSAEError, match="has no models"):
        explorer.add(b"")
    renamed = parts.models[0], parts.models[1], Shown(parts.models[2].title, tuned(2))
    for models in (parts.models[:2], renamed):
        other = Explorer(parts.folder, parts.sae, HASH, models)
        assert "models given are not those" in other.index["notices"][0] and not other.index["live"]


def test_what_cannot_be_shown_is_refused(parts, tmp_path):
    def write(models, gallery):
        return write_blocks(parts.sae, HASH, models, gallery, parts.sets, tmp_path, progress=False)

    gallery = [("General", parts.gallery)]
    with pytest.raises(PatchSAEError, match="no model; give one, or CLIP first"):
        write([], gallery)
    with pytest.raises(PatchSAEError, match="no image"):
        write(parts.models, [])
    other = Shown("cut elsewhere", parts.models[1].backbone.at_block(2))
    with pytest.raises(PatchSAEError, match="'cut elsewhere' is cut after block 2"):
        write([parts.models[0], other], gallery)
    with pytest.raises(PatchSAEError, match="top=0"):
        ExplorerConfig(top=0)
    with pytest.raises(PatchSAEError, match="frequent=2"):
        ExplorerConfig(frequent=2)
    with pytest.raises(PatchSAEError, match="write_blocks"):
        Explorer(tmp_path / "nowhere")


def test_a_notebook_keeps_the_page_beside_the_live_view(parts):
    data, _ = parts.explorer()._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(data)
    assert json.dumps(parts.explorer().index)


def test_the_build_brings_the_blocks_beside_the_page_and_takes_old_ones_away(parts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(project_root() / "book"))
    spec = importlib.util.spec_from_file_location("build", project_root() / "book" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    page = tmp_path / "book" / "notebooks" / "07_explorer.ipynb"
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps({"text/html": parts.explorer().html()}))
    old = tmp_path / "book" / "_static" / "explorer" / "explorer-old"
    old.mkdir(parents=True)
    for _ in range(2):
        build.bring_blocks(tmp_path)
        brought = old.parent / parts.folder.name
        assert [path.name for path in old.parent.iterdir()] == [parts.folder.name]
        assert {p.name for p in brought.iterdir()} == {p.name for p in parts.folder.glob("*.js")}
    page.write_text(page.read_text().replace(parts.folder.name, "explorer-gone"))
    with pytest.raises(PatchSAEError, match="explorer-gone.*make clean book"):
        build.bring_blocks(tmp_path)


def test_the_notebook_at_the_paper_scale(tmp_path, photographs):  # noqa: F811
    """Everything but the sizes is official: layouts, split files, class names, checkpoints."""
    values = photographs | {
        "scale": "paper", "block": 3, "images": 6, "expansion": 4, "gallery_images": 2, "atlas_images": 8,
        "dataset_images": 4, "k": 2, "results": str(tmp_path / "results"),
    }  # fmt: skip
    out = tmp_path / "07.ipynb"
    run_notebook(project_root() / "notebooks" / "07_explorer.ipynb", out, values)
    assert "128 latents" in text_of(out) and "blocks," in text_of(out)
    text = out.read_text()
    assert "patchsae-explorer" in text and "MaPLe for EuroSAT" in text and "widget-view" not in text


@pytest.mark.parametrize(
    ("shares", "left"), [([0.9, 0.1, 0.2, 0.0], [0]), ([0.9, 0.8, 0.2, 0.0], []), ([0.0] * 4, [])]
)
def test_a_list_is_not_emptied_by_what_fires_on_nearly_everything(shares, left):
    atlas = xr.Dataset({"image_frequency_tau": ("latent", shares)})
    assert np.flatnonzero(fires_on_nearly_everything(atlas, 0.5, 4)).tolist() == left
    assert not fires_on_nearly_everything(None, 0.5, 4).any()
