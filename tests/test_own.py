"""A person's own images, model and autoencoder in the chapters."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_ablation import save_model

from patchbook.chapters.opening import open_run
from patchbook.parameters import check_parameters, read_notebook
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root
from patchsae.sae.importers import export_saelens
from patchsae.sae.model import SAE, Activation, SAEConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, count in (("cats", 11), ("dogs", 5), ("eels", 2)):
        (root / name).mkdir()
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02d}.png")
    return root


def opened(model, root, **changes):
    given = {"data": "", "pretrained": "", "block": 1, "device": "cpu", "seed": 0, "results": str(root)}
    return open_run("embedded", model=model, **given | changes)


def test_own_pictures_are_the_images_and_the_benchmark(model, pictures, tmp_path):
    run = opened(model, tmp_path, pictures=str(pictures))
    train, test, (data,), others = run.sets
    assert train.classnames == data.classnames == ("cats", "dogs", "eels") and not others
    assert np.bincount(test.labels).tolist() == [2, 1] and len(train) + len(test) == 18
    assert not {train.key(i) for i in range(len(train))} & {test.key(i) for i in range(len(test))}
    assert (data.train, data.test, data.template) == (train, test, "a photo of a {}.")
    assert (train.split, test.split) == ("train", "test") and not run.has_masks
    with pytest.raises(PatchSAEError, match="no class of .* has 5 images"):
        opened(model, tmp_path, pictures=str(pictures / "eels"))


def test_an_autoencoder_that_is_given_is_taken_as_it_is(model, pictures, tmp_path):
    sae = SAE(SAEConfig(d_in=32, expansion=2), seed=3)
    sae.save(tmp_path / "mine")
    export_saelens(sae, tmp_path / "theirs")
    runs = [opened(model, tmp_path, sae=str(tmp_path / name)) for name in ("mine", "theirs")]
    x = torch.randn(4, 32)
    for run in runs:
        torch.testing.assert_close(run.sae(x), sae(x), rtol=1e-4, atol=1e-5)
        assert (tmp_path / run.sae_hash / "manifest.json").is_file()
    assert opened(model, tmp_path, sae=str(tmp_path / "mine")).sae_hash == runs[0].sae_hash
    SAE(SAEConfig(d_in=16, expansion=2)).save(tmp_path / "narrow")
    with pytest.raises(PatchSAEError, match="is of width 16, the tokens of"):
        _ = opened(model, tmp_path, sae=str(tmp_path / "narrow")).trained


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_topk_and_batchtopk_are_reached_by_name(model, pictures, tmp_path, kind):
    def config(**changes):
        run = opened(model, tmp_path, pictures=str(pictures), **changes)
        task = run.setup.task(run.sets.train, run.backbone, tmp_path, run.changes.sae, run.changes.train)
        return task.sae

    found = config(activation=kind, active=3)
    assert (found.activation, found.k, found.l1) == (Activation(kind), 3, 0.0)
    assert config(activation=kind).k == 16 and config(activation=kind, l1=1e-3).l1 == 1e-3
    plain = config()
    assert (plain.activation, plain.k, plain.l1) == (Activation.RELU, 0, 7e-4)
    assert config(activation="relu") == plain
    with pytest.raises(PatchSAEError, match="activation='tpok' is unknown"):
        config(activation="tpok")


@pytest.mark.parametrize("name", ["01_training", "02_statistics", "03_localization"])
def test_the_chapters_of_one_model_take_them_and_hand_them_on(name):
    notebook = project_root() / "notebooks" / f"{name}.ipynb"
    values = {
        "sae": "hf:me/mine",
        "pictures": "photos",
        "model": "timm:x",
        "activation": "topk",
        "active": "8",
    }
    assert check_parameters(notebook, values) == values | {"active": 8}
    code = "\n".join(cell.source for cell in read_notebook(notebook).cells if cell.cell_type == "code")
    (call,) = re.findall(r"^run = open_run\(\n(.*?)^\)", code, re.DOTALL | re.MULTILINE)
    assert all(f"{name}={name}" in call for name in values)


@pytest.mark.parametrize(
    ("data", "told"),
    [("", "needs the parameter data"), ("nowhere", "data='nowhere' holds no folder imagenet/images/train")],
)
def test_data_are_looked_for_before_a_model_is_fetched(monkeypatch, tmp_path, data, told):
    monkeypatch.setattr(
        "patchbook.scales.Scale.backbone", lambda *_, **__: pytest.fail("a model was asked for")
    )
    with pytest.raises(PatchSAEError, match=told):
        open_run("paper", data=data, model="", pretrained="", block=11, device="cpu", seed=0, results="r")
