"""What an SAE has learned: every measure where the answer is known, and the table of goals."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny import tiny_backbone

from patchbook.chapters.against_untrained import (
    dominant,
    from_start,
    gap,
    lead,
    match,
    measure,
    purity,
    sample,
)
from patchbook.chapters.learned import DIFFERENCES, GOALS, main, sentence, table
from patchbook.chapters.probes import (
    Directions,
    Fisher,
    Moments,
    Probes,
    answer,
    describe,
    first,
    open_probes,
    read,
)
from patchbook.scenes.catalogue import concepts
from patchbook.scenes.embedded import CLUTTERED, SceneSet
from patchsae.clip.backbone import zero_shot_weights
from patchsae.latents.atlas import AtlasConfig, make_atlas
from patchsae.latents.best_latents import random_sae
from patchsae.latents.label_statistics import purity as label_purity
from patchsae.latents.scores import METRICS, Metric, Scores
from patchsae.masking.through import reconstruction, through_sae, zero_shot
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, SAEConfig
from patchsae.sae.step import Stepper


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def scenes(name: str, split: str = "train", n: int = 120) -> SceneSet:
    return first(SceneSet(name, split, range(0, 20, 2), (0, 1), 20, CLUTTERED), n)


@pytest.fixture(scope="module")
def probes(backbone) -> Probes:
    described = scenes("described")
    text = zero_shot_weights(backbone, described.classnames, "a {}")
    masked = {name: scenes(name, "test", 60) for name in ("one", "two")}
    return Probes(described, scenes("scored", "test", 100), masked, text)


@pytest.fixture(scope="module")
def tokens(backbone, probes) -> torch.Tensor:
    return torch.cat([x.flatten(0, 1) for _, _, x in read(backbone, probes.described, "", False)])


def trained(tokens: torch.Tensor, seed: int, **fields) -> SAE:
    sae = SAE(SAEConfig(d_in=32, expansion=2, **fields), seed)
    sae.b_dec.data.copy_(tokens.mean(0))
    stepper, draw = Stepper(sae), torch.Generator().manual_seed(seed)
    for _ in range(200):
        stepper.step(tokens[torch.randint(len(tokens), (256,), generator=draw)], 3e-3)
    return sae


@pytest.fixture(scope="module", params=["relu", "topk"])
def saes(request, tokens) -> dict[str, SAE]:
    fields = {"relu": {"l1": 3e-2}, "topk": {"activation": "topk", "k": 4}}[request.param]
    return {f"seed {seed}": trained(tokens, seed, **fields) for seed in (0, 1)}


@pytest.fixture(scope="module")
def measured(saes, backbone, probes):
    starts = {"seed 0": SAE(saes["seed 0"].config, 0), "seed 1": None}
    return measure(saes, backbone, probes, starts, progress=False)


def test_a_dictionary_that_is_its_start_has_cosine_one():
    config = SAEConfig(d_in=16, expansion=2)
    assert tuple(from_start(SAE(config, 3), SAE(config, 3), "W_dec")) == pytest.approx((1, 1, 1))
    assert abs(from_start(SAE(config, 3), SAE(config, 4), "W_enc").value) < 0.3
    assert from_start(SAE(config, 3), None, "W_dec") is None
    with pytest.raises(PatchSAEError, match="its own start"):
        from_start(SAE(config), SAE(SAEConfig(d_in=16, expansion=3)), "W_dec")


def test_a_permuted_copy_is_matched_whole_and_dead_latents_are_left_out():
    config = SAEConfig(d_in=16, expansion=4)
    sae, copy, order = SAE(config, 0), SAE(config, 1), torch.randperm(64)
    copy.W_dec.data.copy_(sae.W_dec[order])
    alive = np.arange(64) < 40
    found = match(sae, {"copy": copy}, {None: alive, "copy": alive[order]}, 0)
    assert found.matched.value == pytest.approx(1) and found.living.value == pytest.approx(1)
    assert found.chance.high < 0.8
    copy.W_dec.data[alive[order].nonzero()[0][0]] *= -1
    assert match(
        sae, {"copy": copy}, {None: ~alive, "copy": ~alive[order]}, 0
    ).living.value == pytest.approx(1)
    assert tuple(match(sae, {}, {None: alive}, 0)) == (None, None, None)


def test_purity_counts_scenes_that_show_the_commonest_concept():
    # three references of two latents; 7 is in two scenes of the first, twice in one of them
    shown = np.array([[[7, 7, -1], [1, 2, 3]], [[7, 5, -1], [3, 4, -1]], [[4, -1, -1], [3, 9, 1]]])
    np.testing.assert_allclose(dominant(shown), [2 / 3, 1])


def test_purity_by_label_is_the_atlas_and_the_book_s():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=90)
    top = np.stack([rng.permutation(90)[:10] for _ in range(50)], 1)
    pure = np.stack([np.flatnonzero(labels == i % 4)[:10] for i in range(50)], 1)
    found = purity(top, pure, labels[:, None])
    book = label_purity(labels[top])
    assert found.mean.value == pytest.approx(book.observed.mean())
    assert found.null == pytest.approx(book.null.mean(), abs=0.01)
    assert found.untrained.value == 1 and found.ahead.high < 0 and found.half_ahead.value < -0.5
    top[3, 7] = -1  # a latent without all its references is left out
    assert purity(top, pure, labels[:, None]).mean.value == pytest.approx(
        label_purity(np.delete(labels[top], 7, 1)).observed.mean()
    )
    with pytest.raises(PatchSAEError, match="10 reference images"):
        purity(np.full_like(top, -1), pure, labels[:, None])


def test_a_gap_of_unpaired_samples_has_the_interval_of_both():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 400), rng.normal(0, 2, 900)
    found = gap(a, b)
    half = 1.96 * np.sqrt(a.var() / 400 + b.var() / 900)
    assert (found.value, found.low, found.high) == pytest.approx(
        (a.mean() - b.mean(), a.mean() - b.mean() - half, a.mean() - b.mean() + half), abs=0.03
    )


def test_references_are_those_of_the_atlas(saes, backbone, probes, tmp_path):
    found = describe(saes, backbone, probes.described, progress=False)
    for name, sae in saes.items():
        atlas = make_atlas(sae, backbone, probes.described, AtlasConfig(), tmp_path, name, progress=False)
        np.testing.assert_array_equal(found.top[name], atlas.top_index.values)
    np.testing.assert_array_equal(found.concepts, probes.described.scenes(range(120)).concepts)


def test_error_sparsity_and_answers_are_those_of_the_library(saes, backbone, probes, tokens):
    seen = describe({}, backbone, probes.described, progress=False)
    said = answer(saes, {}, backbone, probes.scored, probes.text, seen, progress=False)
    for name, sae in saes.items():
        expected = reconstruction(sae, backbone, probes.scored)
        assert said.error[name].sum() / said.spread.sum() == pytest.approx(expected.fvu, rel=1e-3)
        assert said.active[name].mean() == pytest.approx(expected.l0, rel=1e-6)
        assert (said.fires[name] == 0).mean() == pytest.approx(expected.dead_share, abs=1e-6)
    edits = [None, *(through_sae(sae, backbone) for sae in saes.values())]
    right = zero_shot(backbone, probes.scored, probes.text, edits, progress=None).predictions
    right = right == probes.scored.labels
    np.testing.assert_array_equal(said.right_without, right[0])
    np.testing.assert_array_equal(np.stack(list(said.right.values())), right[1:])
    # principal components of training tokens, on the test scenes
    test = torch.cat([x.flatten(0, 1) for _, _, x in read(backbone, probes.scored, "", False)]).numpy()
    for k in (1, 4, 20):
        pca = PCA(k).fit(tokens.double().numpy())
        gaps = test - pca.inverse_transform(pca.transform(test))
        fvu = np.square(gaps).sum() / np.square(test - test.mean(0)).sum()
        assert said.energy[:, k:].sum() / said.spread.sum() == pytest.approx(fvu, rel=1e-3)


def test_a_supervised_direction_is_fisher_s():
    torch.manual_seed(0)
    x = torch.randn(4000, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    own = torch.zeros(4000, dtype=torch.bool)
    own[:600] = True
    x[own] += torch.tensor([1.0, -2, 0, 0, 3, 0])
    moments, fisher = Moments(6), Fisher(6, torch.device("cpu"))
    moments.add(x)
    fisher.total[1], fisher.count[1] = x[own].sum(0), 600
    found = fisher.directions(moments)
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(x.numpy(), own.numpy()).coef_[0]
    cosine = torch.cosine_similarity(found[1].double(), torch.from_numpy(expected), dim=0)
    assert cosine > 0.95 and (found[0] == 0).all() and len(found) == len(concepts())
    maps = Directions(found[:2])(x[:10].float().view(2, 5, 6))
    assert maps.latent.tolist() == [0, 0, 1, 1] and maps.image.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(maps.value[10:], x[:10].float() @ found[1], rtol=1e-4, atol=1e-4)


def test_the_best_latent_is_chosen_on_one_half_and_the_way_is_a_share():
    # four scenes of each of two classes; latent 0 points at class 0, latent 1 at class 1
    labels = np.repeat([0, 1], 4)
    image, latent = np.divmod(np.arange(16), 2)

    def scores(value, objects=1):
        rows = np.broadcast_to(value.astype(np.float32), (len(METRICS), 16))
        one = np.zeros(8, np.int64)
        return Scores(
            image, latent, rows, np.ones(16, np.float32), np.ones(16, np.float32),
            np.zeros((4, 8), np.float32), labels, one, np.arange(8), one + objects, 2, 0,
        )  # fmt: skip

    perfect = scores(labels[image] == latent)
    halved = scores(np.where(labels[image] == latent, 0.5, 0))
    nothing = scores(np.zeros(16))
    found = lead((halved, nothing, perfect), Metric.POINTING)
    assert (found.best.value, found.untrained.value, found.ceiling.value) == (0.5, 0, 1)
    assert tuple(found.ahead) == (0.5, 0.5, 0.5) and tuple(found.way) == (0.5, 0.5, 0.5)
    with pytest.raises(PatchSAEError, match="2 or more objects"):
        lead((halved, nothing, perfect), Metric.POINTING, objects=2)


def test_the_untrained_control_is_as_sparse(saes, backbone, probes):
    tokens = sample(backbone, probes)
    for sae in saes.values():
        l0 = [(s.encode(tokens) > 0).sum().item() for s in (sae, random_sae(sae, tokens))]
        assert l0[1] == pytest.approx(l0[0], rel=0.001)


def test_everything_is_measured_and_the_table_judges_it(measured):
    first_, second = measured.values()
    assert second.decoder is None and 0 < first_.decoder.value < 1
    assert first_.untrained_l0 == pytest.approx(first_.l0, rel=0.1)  # matched on some tokens
    assert first_.fvu.value - first_.pca.value == pytest.approx(first_.fvu_over_pca.value)
    assert first_.matched.value == pytest.approx(second.matched.value)  # one pair, seen from both sides
    rows = table(measured)
    assert [row["what"] for row in rows] == [goal.what for goal in GOALS]
    assert list(rows[0]) == ["what", "goal", "seed 0", "seed 1", "reached"] and rows[0]["seed 1"] == ""
    by_name = {row["what"]: row for row in rows}
    below = [name for name, m in measured.items() if m.fvu_over_pca.high < 0]
    assert by_name["FVU − PCA"]["reached"] == {0: "no", 2: "yes"}.get(len(below), ", ".join(below))
    assert by_name["L0"]["reached"] == ""
    asked, told = [row for row in rows if row["reached"]], sentence(measured)
    missed = [row["what"] for row in asked if row["reached"] != "yes"]
    assert f"**{len(asked) - len(missed)} of {len(asked)} goals" in told
    assert told.count("* Not reached: ") == len(missed) and all(what in told for what in missed)
    assert all(of(first_).low <= of(first_).value <= of(first_).high for of in DIFFERENCES.values())


def test_numbers_that_are_not_finite_are_refused_by_name(saes, backbone, probes):
    broken = SAE(saes["seed 0"].config)
    broken.W_enc.data[3, 2] = float("nan")
    with pytest.raises(PatchSAEError, match="'other 0' .*make saes"):
        measure(saes, backbone, probes, dict.fromkeys(saes), [broken], progress=False)
    sick = tiny_backbone()
    sick.model.visual.conv1.weight.data[0] = float("nan")
    with pytest.raises(PatchSAEError, match="tiny gives tokens that are not finite"):
        measure(saes, sick, probes, dict.fromkeys(saes), progress=False)


def test_recipes_are_chosen_on_scenes_of_neither_training_nor_test(backbone):
    found = {split: open_probes(backbone, 40, 10, split) for split in ("train", "test")}
    keys = {
        split: {(s.split, s.name) for s in (p.scored, *p.masked.values())} for split, p in found.items()
    }
    assert not keys["train"] & keys["test"]
    trained_on = (found["train"].described.split, found["train"].described.name)
    assert trained_on == ("train", "scenes") and trained_on not in keys["train"] | keys["test"]
    assert len(found["test"].scored) == 40 and len(found["test"].described) == 10


def test_the_command_names_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["--sae", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
