"""Rows of Table 2 on a small CLIP of real architecture, and their settings against the paper's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from tiny import CONFIG, tiny_backbone

from patchbook.chapters.ablation import ALL_TOKENS, DESIGNS, Design, Row, Sweep, run_rows
from patchbook.chapters.published import TABLE_2
from patchbook.scales import scale
from patchsae.clip.backbone import zero_shot_weights
from patchsae.masking.through import contrastive_loss, reconstruction, through_sae, zero_shot
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE
from patchsae.training.activations import Tokens
from patchsae.training.starts import BiasInit

CLS, ALL = Design(block=1, expansion=16), replace(ALL_TOKENS, block=1, expansion=16)


def save_model(root: Path) -> str:
    """Save the small CLIP as a folder, which processes of their own can load."""
    folder = root / "tiny"
    folder.mkdir()
    vision = {"image_size": 112, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(tiny_backbone().model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def sweep_of(model: str, root: Path | str, **options) -> Sweep:
    short = replace(CONFIG, cache=str(root) if root else "")
    cls = replace(short, token_batch=16)
    return Sweep(
        model=model, train=short, cls_train=cls, contrast_images=12, draws=2, **options
    )  # fmt: skip


def test_every_row_of_table_2_has_its_design_and_changes_one_thing():
    assert list(DESIGNS) == list(TABLE_2)
    printed = [(d.block, d.tokens, d.architecture, d.l1, d.expansion, d.ghost) for d in DESIGNS.values()]
    assert printed[2:4] == [(11, "cls", "L/14", 0, 64, True), (11, "cls", "L/14", 8e-4, 64, True)]
    assert [d.expansion for d in DESIGNS.values()].count(64) == 11
    assert [d.block for d in DESIGNS.values()][-4:] == [11, 8, 5, 2]
    assert [d.architecture for d in DESIGNS.values()].count("B/16") == 5
    assert DESIGNS["b_dec from mean"].b_dec_init is BiasInit.MEAN and not DESIGNS["no ghost"].ghost
    # facts.md §0.1: CL SAE is at most CL Org. in every row, and 0.077 is no sum of latents
    assert all(row.cl_sae <= row.cl_original for row in TABLE_2.values() if row.cl_sae is not None)
    assert (
        TABLE_2["λ × 10"].l1_norm
        < min(row.l1_norm for name, row in TABLE_2.items() if row.l1_norm and name != "λ × 10") / 10
    )


def test_settings_differ_from_the_scale_by_the_papers_factors(model):
    setup, sweep = scale("embedded"), sweep_of(model, "")
    cut = {name: replace(design, block=1) for name, design in DESIGNS.items()}
    default, training = sweep.configs(cut["CLS, default"])
    assert (default.l1, default.expansion, default.d_in) == (setup.l1, setup.expansion, 32)
    assert training == replace(sweep.cls_train, tokens=Tokens.CLS)
    assert sweep.configs(cut["λ = 0"])[0].l1 == 0
    assert sweep.configs(cut["λ × 10"])[0].l1 == pytest.approx(10 * setup.l1)
    assert sweep.configs(cut["expansion / 2"])[0].expansion == setup.expansion / 2
    assert sweep.configs(cut["expansion × 2"])[0].d_sae == 2 * default.d_sae
    assert sweep.configs(cut["baseline (Fry)"]) == (default, replace(training, seed=1))
    everything, training = sweep.configs(cut["all tokens"])
    assert everything == default and training == sweep.train
    # at the paper's scale they are the printed ones
    printed, _ = replace(sweep, scale="paper").configs(cut["λ × 10"])
    assert (printed.l1, printed.expansion) == (pytest.approx(8e-4), 64)


def test_the_large_model_plays_its_rows_alone(model):
    sweep = sweep_of(model, "", large_model=str(scale("embedded").model), large_block=5)
    assert (sweep.backbone(CLS).block, sweep.backbone(CLS).d_model) == (5, 128)
    assert (sweep.backbone(ALL).block, sweep.backbone(ALL).d_model) == (1, 32)


@pytest.fixture(scope="module")
def ran(model, images, tmp_path_factory) -> tuple[dict[str, Row], Sweep, Path]:
    """Run three rows, two of them equal, in two processes."""
    root = tmp_path_factory.mktemp("rows")
    sweep = sweep_of(model, root)
    train = {Tokens.CLS: images, Tokens.ALL: images}
    designs = {"cls": CLS, "again": replace(CLS, architecture="B/16"), "all": ALL}
    rows = run_rows(designs, sweep, train, images.subset(range(20)), root, jobs=2, progress=False)
    return rows, sweep, root


def test_equal_rows_are_run_once_and_the_backbone_once_per_kind_of_token(ran):
    rows, _, root = ran
    assert str(rows["cls"]) == str(rows["again"]) != str(rows["all"])
    assert len(list(root.glob("sae-*"))) == len(list(root.glob("ablation-*"))) == 2
    # training: CLS and all; test: all
    assert len(list(root.glob("activations-*/manifest.json"))) == 3


@pytest.mark.parametrize("name", ["cls", "all"])
def test_a_row_equals_what_the_evaluation_says_of_its_sae(ran, images, name):
    rows, sweep, root = ran
    design = CLS if name == "cls" else ALL
    row, backbone, test = rows[name], sweep.backbone(design), images.subset(range(20))
    sae = SAE.load(root / row.folder)
    assert (sae.d_sae, sae.config.l1, sae.config.expansion) == (row.latents, row.l1, row.expansion)
    # without the cache, so equal to the rounding of its tokens
    direct = reconstruction(sae, backbone, test, design.tokens)
    assert (row.mse, row.fvu, row.l1_norm) == pytest.approx(
        (direct.mse, direct.fvu, direct.l1_norm), rel=5e-3
    )
    assert row.l0 == pytest.approx(direct.l0, rel=2e-2)
    losses = contrastive_loss(sae, backbone, test, 12, draws=2, progress=None).drawn
    found = (row.cl_original, row.cl_sae, row.cl_zeroed)
    assert found == pytest.approx([s.mean for s in (losses.original, losses.sae, losses.zeroed)], rel=5e-3)
    text = zero_shot_weights(backbone, test.classnames, sweep.templates)
    edits = (None, through_sae(sae, backbone, design.tokens))
    shares = (zero_shot(backbone, test, text, edits, progress=None).predictions == test.labels).mean(1)
    assert (row.accuracy, row.accuracy_sae) == pytest.approx(shares, abs=0.051)  # one image may tip over
    assert np.isnan(row.recovered) or row.recovered_low <= row.recovered <= row.recovered_high


def run_row(design, sweep, train, test, root) -> Row:
    return run_rows({"": design}, sweep, {design.tokens: train}, test, root, progress=False)[""]


def test_a_finished_row_is_read_without_its_sae_images_or_cache(ran, images, tmp_path, monkeypatch):
    rows, sweep, root = ran
    for part in root.glob("ablation-*"):
        (tmp_path / part.name).mkdir()
        for file in part.glob("*.json"):
            (tmp_path / part.name / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("patchbook.chapters.ablation._run", None)
    found = run_row(ALL, sweep, images, images.subset(range(20)), tmp_path)
    assert str(found) == str(rows["all"])  # a NaN is not itself
    (part,) = [p for p in tmp_path.glob("ablation-*") if rows["cls"].folder in (p / "row.json").read_text()]
    (part / "row.json").write_text("{}")
    with pytest.raises(PatchSAEError, match="row.json' is damaged.*delete the folder"):
        run_row(CLS, sweep, images, images.subset(range(20)), tmp_path)


def test_a_batch_of_one_image_is_refused_before_anything_runs(model, images, tmp_path):
    with pytest.raises(PatchSAEError, match="make no batch"):
        run_row(CLS, sweep_of(model, tmp_path), images, images.subset(range(1)), tmp_path)
    assert not list(tmp_path.iterdir())
