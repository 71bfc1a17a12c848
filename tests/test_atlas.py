"""The pass over an image set: against a dense one, resumed, by two processes, with broken images."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from tiny import tiny_backbone, tiny_images

from patchsae import atlas as atlas_module
from patchsae.accumulator import Accumulator
from patchsae.atlas import AtlasConfig, make_atlas
from patchsae.errors import PatchSAEError
from patchsae.images import FolderImages
from patchsae.sae import SAE, SAEConfig

CONFIG = AtlasConfig(k=4, top=6)


def tiny_sae(**config) -> SAE:
    sae = SAE(SAEConfig(d_in=32, expansion=4, **config), seed=1)
    sae.b_enc.data -= 0.5
    return sae


def make(root: Path, config: AtlasConfig = CONFIG, images=None, **options) -> xr.Dataset:
    images, options = images or tiny_images(), {"batch_size": 8, "progress": False} | options
    return make_atlas(tiny_sae(), tiny_backbone(), images, config, root, "tiny", **options)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory) -> xr.Dataset:
    return make(tmp_path_factory.mktemp("atlas"))


@pytest.mark.parametrize("activation", [{}, {"activation": "topk", "k": 7}])
def test_the_pass_equals_a_dense_one(tmp_path, activation):
    sae, backbone, images = tiny_sae(**activation), tiny_backbone(), tiny_images()
    atlas = make_atlas(sae, backbone, images, CONFIG, tmp_path, "x", 8, progress=False)
    batch = images.load(range(len(images)))
    with torch.no_grad():
        f = sae.encode(backbone.residual(backbone.normalize(batch.images))).double().numpy()  # [N, T, S]
    label, mean, over = batch.labels.numpy(), f.mean(1), f > 0.2
    assert atlas.attrs["images"] == len(images) and atlas.attrs["tokens"] == f.shape[0] * f.shape[1]
    assert atlas.attrs["sae"] == "x" and atlas.attrs["backbone"] == backbone.fingerprint()
    assert atlas.attrs["name"] == "tiny" and atlas.attrs["block"] == 1
    silent = ~(f > 0).any((0, 1))
    np.testing.assert_allclose(atlas.frequency, (mean > 0).mean(0))
    np.testing.assert_allclose(atlas.frequency_tau, over.any(1).mean(0))
    np.testing.assert_allclose(atlas.token_frequency, (f > 0).mean((0, 1)))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(atlas.mean_activation, mean.sum(0) / (mean > 0).sum(0), rtol=1e-4)
        expected = f.sum((0, 1)) / (f > 0).sum((0, 1))
        np.testing.assert_allclose(atlas.mean_token_activation, expected, rtol=1e-4)
    assert np.isnan(atlas.entropy.values[silent]).all()
    np.testing.assert_array_equal(atlas.dataset_count, over.sum((0, 1)))
    cls = over[:, backbone.token_kind == "cls"].sum((0, 1))
    np.testing.assert_array_equal(atlas.class_count_kind.sel(kind="cls").sum("klass"), cls)
    for c in range(len(images.classnames)):
        np.testing.assert_array_equal(atlas.class_count[c], over[label == c].sum((0, 1)))
        np.testing.assert_allclose(atlas.class_sum[c], mean[label == c].sum(0), rtol=1e-4, atol=1e-7)
    assert atlas.class_images.values.tolist() == np.bincount(label).tolist()
    assert all("units" in v.attrs for v in atlas.data_vars.values())


def test_a_second_call_reads_what_is_there(tmp_path, monkeypatch):
    first = make(tmp_path)
    monkeypatch.setattr(Accumulator, "update", None)
    assert make(tmp_path).identical(first)


def test_a_killed_pass_goes_on(tmp_path, atlas, monkeypatch):
    monkeypatch.setattr(atlas_module, "SAVE_SHARE", 1e9)  # save after every batch
    real, calls = Accumulator.update, []

    def update(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(Accumulator, "update", update)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert len(list(tmp_path.glob("atlas-*/part-*"))) == 1 and not list(tmp_path.glob("atlas-*/manifest*"))
    again = make(tmp_path)
    assert len(calls) == 4 + 2  # 40 images in batches of 8, three batches saved
    assert not list(tmp_path.glob("atlas-*/part-*"))
    assert again.identical(atlas)


def test_two_processes_make_the_atlas_of_one(tmp_path, atlas):
    code = "import sys, test_atlas; from pathlib import Path; test_atlas.make(Path(sys.argv[1]))"
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {code}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("atlas-*/atlas.zarr")
    two = xr.open_zarr(path, consolidated=False).load()
    assert two.attrs == atlas.attrs
    for name, expected in atlas.data_vars.items():
        np.testing.assert_allclose(two[name], expected, rtol=1e-6, err_msg=name)


@pytest.fixture
def folder(tmp_path) -> FolderImages:
    rng = np.random.default_rng(0)
    for c in range(3):
        (tmp_path / f"class {c}").mkdir()
        for i in range(4):
            pixels = rng.integers(0, 255, (112, 112, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"class {c}" / f"{i}.png")
    broken = tmp_path / "class 1" / "2.png"
    broken.write_bytes(broken.read_bytes()[:500])
    return FolderImages(tmp_path, 112, "test")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_skipped_counted_and_named(tmp_path, folder, workers):
    atlas = make(tmp_path / "out", images=folder, workers=workers)
    assert atlas.attrs["images"] == 11 and atlas.class_images.values.tolist() == [4, 3, 4]
    assert (atlas.image_latent[6] == -1).all() and 6 not in atlas.top_index
    (manifest,) = (tmp_path / "out").glob("atlas-*/manifest.json")
    (skipped,) = json.loads(manifest.read_text())["facts"]["skipped"]
    assert skipped["image"] == 6 and "class 1/2.png" in skipped["why"]
    with pytest.raises(PatchSAEError, match="class 1/2.png"):
        make(tmp_path / "strict", replace(CONFIG, on_error="raise"), folder)


def test_bad_input_is_named(tmp_path):
    images = tiny_images()
    with pytest.raises(PatchSAEError, match="tau=-0.1"):
        AtlasConfig(tau=-0.1)
    with pytest.raises(PatchSAEError, match="k=0"):
        AtlasConfig(k=0)
    with pytest.raises(PatchSAEError, match="on_error='stop'.*skip, raise"):
        AtlasConfig(on_error="stop")
    with pytest.raises(PatchSAEError, match="k=41 references .* 40 images"):
        make(tmp_path, AtlasConfig(k=41))
    some = images.subset(np.flatnonzero(images.labels != 3))
    with pytest.raises(PatchSAEError, match="no image in"):
        make(tmp_path, images=some)
    assert make(tmp_path, AtlasConfig(k=4, empty_classes=True), some).class_images[3] == 0
    images.labels = np.where(images.labels == 2, 99, images.labels)
    with pytest.raises(PatchSAEError, match="label 99, but there are 10 class names"):
        make(tmp_path, images=images)
