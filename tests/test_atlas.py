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

from patchbook.scenes.embedded import SINGLE, SceneSet
from patchsae.images.files import FolderImages
from patchsae.latents import atlas as atlas_module
from patchsae.latents.accumulator import EDGES, Accumulator
from patchsae.latents.atlas import AtlasConfig, make_atlas
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, SAEConfig

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


def dense(f: np.ndarray, images, kind: np.ndarray, tau: float, k: int, top: int) -> dict:
    """Compute every variable of an atlas from latents f [N, T, S], one by one."""
    n, t, s = f.shape
    labels, classes, exact = images.labels, len(images.classnames), f.astype(np.float64)
    on, over, mean = f > 0, f > np.float32(tau), exact.mean(1)
    kinds = [name for name in ("cls", "patch", "prompt") if name in kind]
    of_kind = [kind == name for name in kinds]
    of_class = [labels == c for c in range(classes)]
    class_sum = np.array([mean[here].sum(0) for here in of_class])

    def entropy_and_std(weights, numbers):
        """Of activations per label, and of the label numbers that they belong to (facts.md §4.6)."""
        by_label = {number: weights[numbers == number].sum() for number in np.unique(numbers)}
        if not weights.sum() > 0:
            return np.nan, np.nan
        p = np.array([mass for mass in by_label.values() if mass > 0]) / weights.sum()
        centre = (weights * numbers).sum() / weights.sum()
        variance = (weights * (numbers - centre) ** 2).sum() / weights.sum()
        return -(p * np.log(p)).sum(), np.sqrt(variance)

    best = np.full((k, s), -1)
    histogram = np.zeros((s, len(EDGES) + 1), int)
    spreads, reference_spreads = np.empty((2, s)), np.empty((2, s))
    for latent in range(s):
        strongest = sorted(range(n), key=lambda i: (-np.float32(mean[i, latent]), i))
        found = [i for i in strongest if mean[i, latent] > 0][:k]
        best[: len(found), latent] = found
        for value in exact[..., latent][on[..., latent]]:
            histogram[latent, sum(np.log10(value) > edge for edge in EDGES)] += 1
        spreads[:, latent] = entropy_and_std(class_sum[:, latent], np.arange(classes))
        reference_spreads[:, latent] = entropy_and_std(mean[found, latent], labels[found])
    highest = np.full((n, top), -1)
    for i in range(n):
        order = sorted(range(s), key=lambda latent: (-np.float32(mean[i, latent]), latent))
        found = [latent for latent in order if mean[i, latent] > 0][:top]
        highest[i, : len(found)] = found
    each, rows = np.arange(s), np.arange(n)[:, None]
    per_image = over.sum(1)  # tokens above τ, [N, S]
    with np.errstate(invalid="ignore"):
        return {
            "image_frequency": on.any(1).mean(0),
            "image_frequency_tau": over.any(1).mean(0),
            "token_frequency": on.mean((0, 1)),
            "mean_activation": mean.sum(0) / on.any(1).sum(0),
            "mean_token_activation": exact.sum((0, 1)) / on.sum((0, 1)),
            "entropy": spreads[0],
            "entropy_references": reference_spreads[0],
            "label_std": reference_spreads[1],
            "label_std_all": spreads[1],
            "dataset_count": over.sum((0, 1)),
            "active_tokens": [on[:, here].sum((0, 1)) for here in of_kind],
            "token_sum": [exact[:, here].sum((0, 1)) for here in of_kind],
            "histogram": histogram,
            "class_count": [over[here].sum((0, 1)) for here in of_class],
            "class_count_kind": [[over[c][:, k].sum((0, 1)) for c in of_class] for k in of_kind],
            "class_sum": class_sum,
            "class_images": [here.sum() for here in of_class],
            "top_value": np.where(best >= 0, mean[best, each], 0),
            "top_index": best,
            "top_label": np.where(best >= 0, labels[best], -1),
            "top_count": np.where(best >= 0, per_image[best, each], 0),
            "image_latent": highest,
            "image_value": np.where(highest >= 0, mean[rows, highest], 0),
            "tokens": [n * here.sum() for here in of_kind],
            # coordinates
            "latent": each,
            "klass": list(images.classnames),
            "kind": kinds,
            "rank": np.arange(k),
            "bin": [*EDGES, np.inf],
        }


@pytest.mark.parametrize("activation", [{}, {"activation": "topk", "k": 7}])
def test_every_field_equals_a_naive_dense_computation(tmp_path, activation):
    sae, backbone = tiny_sae(**activation), tiny_backbone()
    with torch.no_grad():
        sae.b_enc[40] = -1e3  # a silent latent
        sae.W_enc *= 10 ** torch.linspace(-4, 2, sae.d_sae)[:, None]  # values beyond both ends of the bins
        sae.b_enc *= 10 ** torch.linspace(-4, 2, sae.d_sae)
    images = SceneSet("tiny", "train", range(0, 20, 2), (0, 1), 20, SINGLE)
    config = AtlasConfig(tau=0.15, k=4, top=6)
    atlas = make_atlas(sae, backbone, images, config, tmp_path, "x", 8, progress=False)
    with torch.no_grad():
        pixels = torch.cat([images.load(range(i, i + 50)).images for i in range(0, len(images), 50)])
        f = torch.cat(
            [sae.encode(backbone.residual(backbone.normalize(part))) for part in pixels.split(50)]
        )
    expected = dense(f.numpy(), images, backbone.token_kind, 0.15, 4, 6)
    assert len(images) == 200 and set(atlas.variables) == set(expected)
    for name, values in expected.items():
        found = atlas[name].values
        if name in ("klass", "kind") or np.asarray(values).dtype.kind == "i":
            np.testing.assert_array_equal(found, values, name)
        else:
            np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-9, err_msg=name)
    dims = {"latent": 128, "klass": 10, "kind": 2, "bin": 22, "rank": 4, "image": 200, "place": 6}
    assert dict(atlas.sizes) == dims
    assert all(v.attrs["units"] for v in atlas.data_vars.values())
    assert atlas.attrs == {
        "images": 200, "tokens": 10_000, "tau": float(np.float32(0.15)), "name": "tiny", "block": 1,
        "sae": "x", "weights": sae.fingerprint(), "backbone": backbone.fingerprint(),
        "image_set": images.fingerprint(),
    }  # fmt: skip


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


def test_an_image_that_could_not_be_read_is_tried_again_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas_module, "SAVE_SHARE", 1e9)  # save after every batch
    images, real, broken = tiny_images(), SceneSet.load, {3, 20}

    def load(self, indices):
        if broken & set(map(int, indices)):
            raise PatchSAEError("a disk that comes and goes")
        return real(self, indices)

    def update(self, lists, labels, indices, add=Accumulator.update):
        if 30 in indices:
            raise KeyboardInterrupt
        add(self, lists, labels, indices)

    monkeypatch.setattr(SceneSet, "load", load)
    with monkeypatch.context() as patched:
        patched.setattr(Accumulator, "update", update)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, images=images)
    broken.remove(3)
    atlas = make(tmp_path, images=images)
    assert atlas.attrs["images"] == 39 and (atlas.image_latent[20] == -1).all()
    (manifest,) = tmp_path.glob("atlas-*/manifest.json")
    (skipped,) = json.loads(manifest.read_text())["facts"]["skipped"]
    assert skipped == {"image": 20, "why": "a disk that comes and goes"}


@pytest.mark.parametrize(
    ("broken", "config", "message"),
    [
        (range(40), CONFIG, "k=4 .* 0 images that can be read: correct .*40 failed; the first: lost"),
        (range(37), AtlasConfig(k=4, empty_classes=True), "k=4 .* 3 images that can be read"),
        (range(2, 40, 10), CONFIG, "class '.*' .and 0 more. has no image in 'tiny' that can be read"),
    ],
)
def test_too_few_readable_images_are_no_atlas_and_nothing_is_lost(
    tmp_path, atlas, monkeypatch, broken, config, message
):
    real = SceneSet.load

    def load(self, indices):
        if set(broken) & set(map(int, indices)):
            raise PatchSAEError("lost.")
        return real(self, indices)

    with monkeypatch.context() as patched:
        patched.setattr(SceneSet, "load", load)
        with pytest.raises(PatchSAEError, match=message):
            make(tmp_path, config)
    (part,) = tmp_path.glob("atlas-*/part-*")
    assert not (part.parent / "manifest.json").exists()
    read, add = [], Accumulator.update
    monkeypatch.setattr(Accumulator, "update", lambda self, *args: read.extend(args[2]) or add(self, *args))
    whole = make(tmp_path, config)
    assert read == list(broken)
    np.testing.assert_array_equal(whole.class_count, atlas.class_count)


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


@pytest.mark.parametrize("options", [{"batch_size": -1}, {"batch_size": 0}, {"workers": -1}])
def test_impossible_arguments_leave_nothing_behind(tmp_path, atlas, options):
    with pytest.raises(
        PatchSAEError, match=f"{next(iter(options))}={next(iter(options.values()))} must be"
    ):
        make(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_described(tmp_path):
    sae = tiny_sae()
    sae.b_dec.data[0] = torch.nan
    with pytest.raises(PatchSAEError, match="NaN or infinite values in b_dec"):
        make_atlas(sae, tiny_backbone(), tiny_images(), CONFIG, tmp_path, "tiny", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_pass_that_saw_less_than_the_set_is_not_finished(tmp_path, atlas, monkeypatch):
    monkeypatch.setattr(atlas_module._Pass, "_add", lambda *args: iter(()))
    with pytest.raises(PatchSAEError, match="saw 0 of 40 images, so it is not finished"):
        make(tmp_path)
    assert not list(tmp_path.glob("*/manifest.json"))
    monkeypatch.undo()
    np.testing.assert_array_equal(make(tmp_path).class_count, atlas.class_count)


def test_an_atlas_that_lost_a_chunk_is_named(tmp_path):
    make(tmp_path)
    (chunk,) = tmp_path.glob("atlas-*/atlas.zarr/mean_activation/0")
    chunk.unlink()  # zarr would read it as NaN
    with pytest.raises(PatchSAEError, match="atlas.zarr/mean_activation/0 is missing: copy the whole"):
        make(tmp_path)
