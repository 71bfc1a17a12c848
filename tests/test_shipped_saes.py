"""Shipped SAEs: found by their inputs, refused when damaged, made again by the target of `make saes`."""

import importlib.util
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG

from patchbook.chapters.ablation import ALL_TOKENS, DESIGNS, Budget, Sweep
from patchbook.recipes import TWIN, book_plan, fvu_of_pca, recipes
from patchbook.scales import scale
from patchbook.shipped import find_or_train, load_shipped, publish, put, read_index, shelf
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import file_digest, project_root
from patchsae.sae.model import SAE, SAEConfig
from patchsae.training.activations import Tokens
from patchsae.training.trainer import train_sae, training_digest

SAE_CONFIG = SAEConfig(d_in=32, expansion=4, l1=1e-4)
FOLDER = project_root() / "artefacts" / "sae"


@pytest.fixture(scope="module")
def made(backbone, images, tmp_path_factory) -> Path:
    """Put one tiny SAE on a shelf of its own."""
    folder = tmp_path_factory.mktemp("shelf")
    trained = train_sae(images, backbone, SAE_CONFIG, CONFIG, folder / "work", progress=False)
    inputs = training_digest(images, backbone, SAE_CONFIG, CONFIG)
    put("one", trained, inputs, {"tokens": 4800, "seconds": 1.0}, folder)
    publish(["one"], folder)
    return folder


@pytest.fixture
def own(made, tmp_path) -> Path:
    """Return a copy of the shelf that may be damaged."""
    return Path(shutil.copytree(made, tmp_path / "shelf", ignore=shutil.ignore_patterns("work")))


def test_the_very_inputs_are_loaded_and_any_others_trained(made, backbone, images, tmp_path):
    found = find_or_train(images, backbone, SAE_CONFIG, CONFIG, tmp_path, False, made)
    trained = train_sae(images, backbone, SAE_CONFIG, CONFIG, tmp_path, progress=False)
    assert (found.shipped, trained.shipped) == ("one", "")
    assert found.sae.W_enc.dtype == torch.float32 and found.sae.config == SAE_CONFIG
    for a, b in zip(found.sae.parameters(), trained.sae.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    one, two = ([row | {"tokens_per_second": 0} for row in run.metrics] for run in (found, trained))
    assert one == two
    # a folder of its own under root, as a result has: what is made of one is not taken for the other's
    assert found.folder != trained.folder and found.folder.name.startswith("sae-")
    assert torch.equal(SAE.load(found.folder).W_dec, found.sae.W_dec)
    again = find_or_train(images, backbone, SAE_CONFIG, CONFIG, tmp_path, False, made)
    assert again.folder == found.folder and torch.equal(again.sae.W_enc, found.sae.W_enc)
    other = find_or_train(images, backbone, SAE_CONFIG, replace(CONFIG, seed=1), tmp_path, False, made)
    assert other.shipped == ""
    nothing = find_or_train(images, backbone, SAE_CONFIG, CONFIG, tmp_path, False, tmp_path / "none")
    assert nothing.folder == trained.folder


def seal(folder: Path) -> None:
    """Write the sha256 of changed weights into the index, so that what is inside them is looked at."""
    index = json.loads((folder / "index.json").read_text())
    index["one"]["sha256"] = file_digest(folder / "one" / "sae.safetensors")
    (folder / "index.json").write_text(json.dumps(index))


def change_weights(folder: Path, change) -> None:
    path = folder / "one" / "sae.safetensors"
    save_file(change(load_file(path)), path)
    seal(folder)


def rewrite(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def infinite(tensors):
    tensors["b_enc"][3] = float("inf")
    return tensors


DAMAGE = {
    "no weights": (lambda f: (f / "one/sae.safetensors").unlink(), "sae.safetensors' is missing"),
    "no config": (lambda f: (f / "one/sae.json").unlink(), "sae.json' is missing"),
    "no card": (lambda f: (f / "one/card.json").unlink(), "card.json' is missing"),
    "no metrics": (lambda f: (f / "one/metrics.csv").unlink(), "metrics.csv' is missing"),
    "cut": (
        lambda f: (f / "one/sae.safetensors").write_bytes((f / "one/sae.safetensors").read_bytes()[:-9]),
        "sae.safetensors' is damaged: its sha256",
    ),
    "cut and sealed": (
        lambda f: ((f / "one/sae.safetensors").write_bytes(b"xxxxxxxxxxxx"), seal(f)),
        "one' is damaged",
    ),
    "short": (lambda f: change_weights(f, lambda t: t | {"b_enc": t["b_enc"][:5].clone()}), "is damaged"),
    "infinite": (lambda f: change_weights(f, infinite), "has NaN or infinite values in b_enc"),
    "config": (lambda f: (f / "one/sae.json").write_text("{"), "one' is damaged"),
    "other config": (lambda f: rewrite(f / "one/sae.json", lambda c: c | {"l1": 1.0}), "is not of the SAE"),
    "foreign": (lambda f: rewrite(f / "one/card.json", lambda c: c | {"inputs": "0"}), "is not of the SAE"),
    "card": (lambda f: (f / "one/card.json").write_text("[]"), "one' is damaged"),
    "metrics": (lambda f: (f / "one/metrics.csv").write_text("step\nmany\n"), "one' is damaged"),
    "index": (lambda f: (f / "index.json").write_text('{"one": 3}'), "index.json' is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_artefact_is_refused_by_name(name, own, backbone, images, tmp_path):
    damage, message = DAMAGE[name]
    damage(own)
    with pytest.raises(PatchSAEError, match=f"{message}.*run 'make saes'") as error:
        find_or_train(images, backbone, SAE_CONFIG, CONFIG, tmp_path / "runs", False, own)
    assert "\n" not in str(error.value)


def test_an_artefact_of_another_width_is_refused(own, backbone, images, tmp_path):
    wide = SAE(SAEConfig(d_in=64, expansion=2))
    wide.save(own / "one")
    rewrite(own / "one/card.json", lambda c: c | {"sae": json.loads((own / "one/sae.json").read_text())})
    seal(own)
    with pytest.raises(PatchSAEError, match="is of width 64, not 32; run 'make saes'"):
        find_or_train(images, backbone, SAE_CONFIG, CONFIG, tmp_path / "runs", False, own)
    with pytest.raises(PatchSAEError, match="names no SAE 'two', only one; run 'make saes'"):
        load_shipped("two", own)


def test_training_what_should_be_on_the_shelf_is_announced_once(made, backbone, images, tmp_path):
    arguments = images, backbone, SAE_CONFIG, replace(CONFIG, images=24), tmp_path, False, made
    with pytest.warns(UserWarning, match="No SAE in .* trained from this scale's recipe.*make saes"):
        find_or_train(*arguments, expected=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_or_train(*arguments, expected=True)  # it is there now
        find_or_train(*arguments)


def test_the_scale_knows_its_own_recipe(tmp_path):
    setup = scale("embedded")
    backbone = setup.backbone()
    train = setup.sets(backbone, "").train

    def own(images, model, sae={}, train={}):  # noqa: B006
        return setup._is_own(images, model, setup.task(images, model, tmp_path, sae, train))

    assert own(train, backbone) and own(train, backbone, train={"seed": 2}, sae={"l1": None})
    assert own(train, backbone.at_block(5)) and not own(train, backbone.at_block(4))
    assert not own(train, backbone.at_block(5), train={"seed": 1})
    assert not own(train, backbone, sae={"expansion": 2}) and not own(train, backbone, train={"images": 9})
    assert not own(train.sample(99), backbone)
    few = replace(setup, different_images=50)
    task = few.task(train, backbone, tmp_path)
    assert len(task.images) == 50 and task.train.cache == str(tmp_path)
    assert len(few.task(train, backbone, tmp_path, train={"images": 9}).images) == 9
    assert replace(setup, different_images=0).task(train, backbone, tmp_path).images is train


def test_pca_explains_what_its_components_span():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=draw) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1, 0.1, 0.1])
    left = [fvu_of_pca(x, x, n) for n in (0, 1, 3, 8)]
    spread = (x - x.mean(0)).square().sum(0)
    assert left[0] == pytest.approx(1) and left[3] < 1e-9
    assert left[1] == pytest.approx(1 - (spread[0] / spread.sum()).item(), rel=0.02)
    assert fvu_of_pca(x, x, 99) < 1e-9


def test_the_rows_that_are_shipped_are_those_that_chapter_6_asks_for():
    cells = nbformat.read(project_root() / "notebooks" / "06_appendix.ipynb", 4).cells
    values = {}
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    exec(parameters.source, values)
    for name in vars(Budget()):
        assert values[name] == getattr(Budget(), name)
    assert (values["seed"], values["expansion"], values["l1"]) == (0, None, None)


def test_rows_on_all_tokens_are_the_scales_own_autoencoders(tmp_path):
    plan = book_plan()
    shipped = recipes(plan, tmp_path)
    rows = {"all tokens": "main", "block 8": "block8", "block 2": "block2", TWIN: "seed1"}
    designs = DESIGNS | {TWIN: replace(ALL_TOKENS, replicate=1)}
    budget, setup = plan.budget, plan.scale
    sweep = Sweep(setup.name, **budget.runs(setup, tmp_path, seed=0))
    for row, name in rows.items():
        recipe, backbone = shipped[name](), sweep.backbone(designs[row])
        images = budget.sets(setup, setup.sets(backbone, "").train, seed=0)[Tokens.ALL]
        assert training_digest(images, backbone, *sweep.configs(designs[row])) == training_digest(
            recipe.task.images, recipe.backbone, recipe.task.sae, recipe.task.train
        )


@pytest.fixture(scope="module")
def target():
    """Return artefacts/sae/train.py as a module."""
    spec = importlib.util.spec_from_file_location("saes_of_the_book", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_target_makes_an_autoencoder_again(target, tmp_path, capsys):
    names = ["main", "table2-l1-times-10"]
    ways = [["--out", str(tmp_path / name), "--work", str(tmp_path / f"work-{name}")] for name in "ab"]
    for way in ways:
        assert target.main(["--tiny", "--jobs", "1", "--only", *names, *way]) == 0
    assert set(read_index(tmp_path / "a")) == set(names)
    for name in names:
        one, two = (load_shipped(name, tmp_path / where) for where in "ab")
        assert all(
            torch.equal(p, q) for p, q in zip(one.sae.parameters(), two.sae.parameters(), strict=True)
        )
        assert one.card["inputs"] == two.card["inputs"] and one.card["measured"] == two.card["measured"]
        assert {"fvu", "fvu_pca", "l0", "dead_share", "cosine_with_start"} <= set(one.card["measured"])
        assert "CC BY-SA 4.0" in one.card["licence"]["images"] and one.card["seed"] == 0
    # what fits stays; what is damaged is made anew from the finished run
    before = (tmp_path / "a/main/card.json").stat().st_mtime_ns
    (tmp_path / "a/table2-l1-times-10/sae.safetensors").write_bytes(b"")
    assert target.main(["--tiny", "--jobs", "1", "--only", *names, *ways[0]]) == 0
    assert (tmp_path / "a/main/card.json").stat().st_mtime_ns == before
    load_shipped("table2-l1-times-10", tmp_path / "a")
    assert target.main(["--only", "block3", *ways[0]]) == 2
    assert "block3 unknown; choose of main, seed1" in capsys.readouterr().err


def test_names_of_recipes():
    assert list(recipes(book_plan(), "")) == [
        "main", "seed1", "seed2", "block2", "block5", "block8", "topk", "maple", "table2-baseline-fry",
        "table2-cls-default", "table2-l1-is-0", "table2-l1-times-10", "table2-expansion-over-2",
        "table2-expansion-times-2", "table2-no-ghost", "table2-b-dec-from-mean",
    ]  # fmt: skip


def test_what_is_committed_is_whole_and_small():
    index = read_index()
    assert sorted(path.parent.name for path in FOLDER.glob("*/card.json")) == sorted(index)
    assert sum(path.stat().st_size for path in FOLDER.glob("*/*")) < 20e6 and shelf() == FOLDER
    for name in index:
        found = load_shipped(name)
        assert found.sae.d_in == scale("embedded").backbone().d_model
        assert np.isfinite(list(found.card["measured"].values())).all()
    if index:
        known = recipes(book_plan(), "")
        assert {"main", "seed1", "seed2", "topk"} <= set(index) <= set(known)
        recipe = known["main"]()
        inputs = training_digest(recipe.task.images, recipe.backbone, recipe.task.sae, recipe.task.train)

        assert index["main"]["inputs"] == inputs, "the small CLIP or recipe changed: run 'make saes'"
