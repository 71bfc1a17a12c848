"""What latents stand for: hand-made activations whose answer is known, and a run on a small CLIP."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from patchbook import figures, kept
from patchbook.chapters import kept_truth
from patchbook.chapters.factors import Factor, levels, plan_scenes, shown
from patchbook.chapters.kept_truth import keep_truth
from patchbook.chapters.truth import (
    Dictionary,
    TruthConfig,
    clearest,
    coverage,
    dictionaries,
    explain,
    explained_by,
    known_truth,
    selectivity,
    supervised,
)
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import group_auroc
from patchsae.sae.model import SAE, SAEConfig

CONFIG = TruthConfig(least=4)


@pytest.fixture(scope="module")
def halves():
    """Return the levels of two halves of 400 scenes, and a concept that both have often enough."""
    a, b = (shown(plan_scenes(1600, f"halves/{part}")) for part in "ab")
    concept = int(np.flatnonzero(np.minimum(a.sum(0), b.sum(0)) >= 4)[5])
    assert levels().factor[concept] == 0
    return a, b, concept


def test_auroc_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    score = np.round(rng.random((70, 11)) * (rng.random((70, 11)) < 0.5), 1).astype(np.float32)
    member = rng.random((70, 5)) < [0.1, 0.3, 0.5, 0.9, 0.2]
    found = group_auroc(score, member, chunk=4)
    wanted = [[roc_auc_score(m, s) for s in score.T] for m in member.T]
    np.testing.assert_allclose(found, wanted)
    assert np.isnan(group_auroc(score, np.zeros((70, 1), bool))).all()
    assert np.isnan(group_auroc(score, np.ones((70, 1), bool))).all()


def test_an_indicator_is_explained_and_noise_is_not(halves):
    in_a, in_b, concept = halves
    rng = np.random.default_rng(1)
    blue = levels().names.index("blue")

    def units(member):
        noise = rng.random((len(member), 40)).astype(np.float32)
        wanted = member[:, [concept, blue, -1]].astype(np.float32)
        silent = np.zeros((len(member), 1), np.float32)
        return np.concatenate([wanted, wanted[:, :1] + noise[:, :1], silent, noise], 1)

    found = explain(units(in_a), units(in_b), in_a, in_b, CONFIG)
    assert found.level[:5].tolist() == [concept, blue, in_a.shape[1] - 1, concept, -1]
    assert (found.auroc[:3] == 1).all() and found.hit[:4].all()
    assert not found.living[4] and np.isnan(found.auroc[4]) and not found.hit[4]
    assert not found.hit[5:].any() and abs(found.auroc[5:].mean() - 0.5) < 0.08
    assert found.share.value == pytest.approx(4 / 44) and found.share.low < 4 / 44 < found.share.high
    assert found.unit[concept] in (0, 3) and found.unit_auroc[concept] == 1
    assert found.unit[blue] == 1 and found.unit_auroc[-1] == 1


def test_a_unit_chosen_by_chance_is_judged_on_the_other_half(halves):
    in_a, in_b, concept = halves
    a, b = in_a[:, [concept]].astype(np.float32), np.random.default_rng(0).random((len(in_b), 1))
    found = explain(a, b.astype(np.float32), in_a, in_b, CONFIG)
    assert found.level[0] == concept and found.auroc[0] < 0.9 and not found.hit[0]


def test_a_level_with_few_scenes_is_left_out(halves):
    in_a, in_b, concept = halves
    few = in_b.copy()
    few[np.flatnonzero(few[:, concept])[CONFIG.least - 1 :], concept] = False
    found = explain(in_a.astype(np.float32), in_b.astype(np.float32), in_a, few, CONFIG)
    assert found.unit[concept] == -1 and np.isnan(found.unit_auroc[concept])
    assert concept not in found.level
    with pytest.raises(PatchSAEError, match="no level has 4000 scenes.*more images"):
        explain(in_a.astype(np.float32), in_b.astype(np.float32), in_a, in_b, TruthConfig(least=4000))


def test_bad_activations_and_numbers_are_refused(halves):
    in_a, in_b, _ = halves
    a = np.ones((len(in_a), 2), np.float32)
    a[7, 1] = np.nan
    with pytest.raises(PatchSAEError, match="NaN"):
        explain(a, a, in_a, in_b, CONFIG)
    with pytest.raises(PatchSAEError, match="pairs=0"):
        TruthConfig(pairs=0)


def test_a_supervised_direction_finds_what_is_linear():
    rng = np.random.default_rng(0)
    member = rng.random((600, 2)) < 0.2
    x = rng.normal(size=(600, 8)) * [5, 1, 1, 1, 1, 1, 1, 1]
    x[:, 0] += 4 * x[:, 1]  # the first direction is hidden in one that varies more
    x[:, 1] += 4 * member[:, 0]
    found = supervised(x[:300], x[300:], member[:300], member[300:], 0.01)
    assert found[0] > 0.97 and abs(found[1] - 0.5) < 0.15
    lacking = member.copy()
    lacking[:, 1] = False
    assert np.isnan(supervised(x[:300], x[300:], lacking[:300], lacking[300:], 0.01)[1])


def test_selectivity_is_the_strongest_factors_share():
    share = selectivity(np.array([[3.0, 1, 0], [1, 1, 0]]))
    np.testing.assert_allclose(share, [0.75, 0.5, np.nan])


def test_the_untrained_sae_is_as_sparse_and_both_signs_are_units():
    sae = SAE(SAEConfig(d_in=32, expansion=4), seed=1)
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) + 1
    with torch.no_grad():
        sae.b_enc -= 0.8
        found = {name: unit(x) for name, unit in dictionaries(sae, x).items()}
    trained, control = ((found[n] > 0).sum().item() for n in (Dictionary.TRAINED, Dictionary.UNTRAINED))
    assert abs(trained - control) <= 1 and 0 < trained < found[Dictionary.TRAINED].numel() / 2
    assert (found[Dictionary.RAW] == torch.cat([x, -x], 1)).all()
    pca = found[Dictionary.PCA]
    assert pca.shape == (500, 64) and torch.allclose(pca[:, :32], -pca[:, 32:])
    variance = pca[:, :32].var(0)
    assert (variance[:-1] >= variance[1:] - 1e-4).all()
    assert torch.allclose(torch.corrcoef(pca[:, :32].T), torch.eye(32), atol=1e-3)


def test_what_is_kept_is_what_was_found(backbone, tmp_path, monkeypatch):
    sae = SAE(SAEConfig(d_in=32, expansion=4, activation="topk", k=4))
    config = TruthConfig(images=60, pairs=6, fit_images=8, least=3)
    found = known_truth(sae, backbone, config)
    keep_truth(sae, backbone, config, tmp_path)
    monkeypatch.setattr(kept_truth, "known_truth", None)  # it is not asked again
    again = keep_truth(sae, backbone, config, tmp_path)
    for name in Dictionary:
        for one, two in zip(found.explained[name], again.explained[name], strict=True):
            np.testing.assert_array_equal(np.array(one), np.array(two))
        np.testing.assert_array_equal(found.effects[name], again.effects[name])
    assert again.ahead == found.ahead and again.levels.names == found.levels.names
    np.testing.assert_array_equal(again.ceiling, found.ceiling)
    (file,) = tmp_path.rglob(kept.RESULT)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(PatchSAEError, match="is not the file that was made.*delete"):
        keep_truth(sae, backbone, config, tmp_path)


def test_a_run_is_complete_repeatable_and_can_be_drawn(backbone):
    sae = SAE(SAEConfig(d_in=32, expansion=4, activation="topk", k=4))
    config = TruthConfig(images=60, pairs=6, fit_images=8, least=3)
    truth, again = known_truth(sae, backbone, config), known_truth(sae, backbone, config)
    asked = ~np.isnan(truth.ceiling)
    assert 0 < asked.sum() < len(truth.levels.names)
    for name, units in zip(Dictionary, (128, 128, 64, 64), strict=True):
        found, effect = truth.explained[name], truth.effects[name]
        assert found.auroc.shape == (units,) and effect.shape == (len(Factor), units)
        assert (np.isfinite(effect).all(0) == found.living).all() and found.living.any()
        assert ((found.unit >= 0) == asked).all()
        assert explained_by(truth, name).sum() == found.hit.sum()
        np.testing.assert_array_equal(found.auroc, again.explained[name].auroc)
        np.testing.assert_array_equal(effect, again.effects[name])
    assert truth.ahead == again.ahead and truth.ahead.low <= truth.ahead.value <= truth.ahead.high
    assert set(coverage(truth, Factor.STYLE)) == {*Dictionary, "supervised directions"}
    assert len(coverage(truth, Factor.STYLE)["supervised directions"]) == 3
    shown_units = clearest(truth, Dictionary.TRAINED, 3)
    found = truth.explained[Dictionary.TRAINED]
    owner = truth.levels.factor[found.level[shown_units]]
    assert (np.diff(owner) >= 0).all() and np.bincount(owner).max() <= 3
    effect = truth.effects[Dictionary.TRAINED][:, shown_units]
    figure = figures.known_truth(
        {name: e.share for name, e in truth.explained.items()},
        {name: (best[np.isfinite(best)] >= 0.9).mean() for name, best in coverage(truth).items()},
        dict(zip(Factor, explained_by(truth, Dictionary.TRAINED), strict=True)),
        effect / effect.sum(0),
        [list(Factor)[f] for f in owner],
    )
    assert len(figure.axes) == 4
    other = known_truth(sae, backbone, TruthConfig(images=60, pairs=6, fit_images=8, least=3, seed=1))
    assert not np.array_equal(other.explained[Dictionary.RAW].auroc, truth.explained[Dictionary.RAW].auroc)
