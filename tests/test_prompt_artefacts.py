"""The committed prompts: what they belong to, and that the target which made them makes them again."""

import csv
import importlib.util

import numpy as np
import pytest
import torch

from patchbook.scales import scale
from patchbook.scenes.embedded import DATASETS, embedded_dataset
from patchbook.train_prompts import EMBEDDED_SHOTS, SHOTS
from patchsae.adaptation.prompt_files import MissingPrompts, find_prompts, load_prompts, read_card
from patchsae.adaptation.prompts import Method
from patchsae.images.few_shot import read_manifest
from patchsae.runs.stage import project_root

FOLDER = project_root() / "artefacts" / "prompts"
CARDS = sorted(FOLDER.glob("*/*/seed*/prompts.json"))


@pytest.fixture(scope="module")
def plain():
    return scale("embedded").backbone()


@pytest.fixture(scope="module")
def target():
    """Return artefacts/prompts/train.py as a module."""
    spec = importlib.util.spec_from_file_location("prompts_of_the_book", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_embedded_data_set_has_prompts_and_the_shifted_ones_three_seeds(target):
    found = {(path.parts[-4], path.parts[-3], path.parts[-2]) for path in CARDS}
    wanted = {("maple", d, f"seed{s}") for d in DATASETS for s in target.SEEDS.get(d, (1,))}
    wanted |= {(method, d, "seed1") for method in ("coop", "vpt", "lora", "full") for d in target.HALVES}
    assert found == wanted
    assert sum(path.with_name("prompts.safetensors").stat().st_size for path in CARDS) < 18e6


@pytest.mark.parametrize("path", CARDS, ids=lambda path: "-".join(path.parts[-4:-1]))
def test_prompts_belong_to_the_small_clip_and_to_the_images_they_name(plain, path):
    method, name, seed = path.parts[-4:-1]
    card, dataset = read_card(path.parent), embedded_dataset(name)
    assert f"seed{card.seed}" == seed and card.config.method == method
    assert card.classnames == dataset.base().classnames
    tuned = load_prompts(path.parent, plain)
    assert tuned.n_tokens == plain.n_tokens + (2 if method in ("maple", "vpt") else 0)
    drawn = read_manifest(path.with_name("manifest.json"), dataset)
    shots = EMBEDDED_SHOTS.get(name, SHOTS)
    assert np.bincount(drawn.train.labels).tolist() == [shots] * len(dataset.classnames)


def test_the_target_makes_the_committed_prompts_again(plain, target, tmp_path):
    work = ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert target.main(["--dataset", "silhouettes", "--seeds", "1", *work]) == 0
    folder = tmp_path / "maple" / "silhouettes" / "seed1"
    committed = FOLDER / "maple" / "silhouettes" / "seed1"
    assert (folder / "manifest.json").read_text() == (committed / "manifest.json").read_text()
    rows = [list(csv.DictReader(open(f / "metrics.csv"))) for f in (folder, committed)]
    losses = np.array([[float(row["loss"]) for row in found] for found in rows])
    # the same start; another processor rounds otherwise, and training makes that grow
    np.testing.assert_allclose(losses[0, 0], losses[1, 0], rtol=1e-4)
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.06)
    found, own, *others = (
        load_prompts(f, plain).class_weights(read_card(f).classnames)
        for f in (folder, *(committed.with_name(f"seed{seed}") for seed in (1, 2, 3)))
    )
    gap, *apart = (1 - torch.nn.functional.cosine_similarity(found, texts) for texts in (own, *others))
    assert all((4 * gap < distance).all() for distance in apart), "as far from its own as from other seeds"


def test_prompts_that_are_not_there_are_named(plain):
    with pytest.raises(MissingPrompts, match="of maple for 'eurosat' with seed 1.*patchsae prompts"):
        find_prompts(FOLDER, "eurosat", plain)
    with pytest.raises(MissingPrompts, match="of vpt for 'concepts'.*make prompts") as missing:
        find_prompts(FOLDER, "concepts", plain, method=Method.VPT)
    assert "MaPLe's" not in str(missing.value)  # who published no VPT
