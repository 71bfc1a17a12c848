"""What chapters compute and say, on planted results: gaps between masks, parts of a gain, sentences."""

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from patchbook.chapters import localization, masking, masking_sets, rebuilt, seeds, table2, training
from patchbook.chapters.ablation import DESIGNS
from patchbook.chapters.adaptation import mixtures, ranked
from patchbook.chapters.adaptation.tasks import CLIP, MAPLE, Settings
from patchbook.chapters.opening import Changes, Run
from patchbook.chapters.published import TABLE_2
from patchbook.recipes import TWIN
from patchbook.report import Reason, Verdict
from patchsae.adaptation.remapping import PARTS, Parts
from patchsae.latents.stability import Against
from patchsae.masking.masked_tokens import Mode
from patchsae.masking.rankings import CLASS, PREDICTED
from patchsae.masking.sweep import MaskingConfig, curves
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval
from patchsae.training.activations import Tokens

N, SIZES = 300, [5, 50, 1000]
RANKINGS = [CLASS, PREDICTED, "dataset", "random 0", "random 1"]


def run_of(d_sae=1000, seed=0, **more):
    trained = SimpleNamespace(sae=SimpleNamespace(d_sae=d_sae))
    fields = {"trained": trained, "sae": trained.sae, "seed": seed, "sae_hash": "sae"} | more
    return SimpleNamespace(few=lambda images, n: images, **fields)


def swept(right, original=0.9, seed=0):
    """Make the result of a sweep: the share of images right under each (ranking, switch, k)."""
    rng = np.random.default_rng(seed)
    u = rng.random(N)  # the same images are hard under every mask
    shape = (len(RANKINGS), 2, len(SIZES))
    shares = np.array([[[right(r, s, k) for k in SIZES] for s in ("on", "off")] for r in RANKINGS])
    assert shares.shape == shape
    rank = (u[:, None, None, None] >= shares).astype(np.int32)
    return xr.Dataset(
        {
            "rank": (("image", "ranking", "switch", "k"), rank),
            "prediction": (("image", "ranking", "switch", "k"), rank),
            "label": ("image", np.arange(N) % 10),
            "original_rank": ("image", (u >= original).astype(np.int32)),
        },
        {"ranking": RANKINGS, "switch": ["on", "off"], "k": SIZES},
        {"classes": 10, "name": "planted"},
    )


def planted(name, switch, k):
    """Class-level latents carry the class; of all others as many do nothing until most are there."""
    if k == SIZES[-1]:
        return 0.85 if switch == "on" else 0.1
    if name in (CLASS, PREDICTED):
        return 0.8 if switch == "on" else 0.2
    return 0.1 if switch == "on" else 0.8


def main_sweep(right=planted):
    data_set = SimpleNamespace(title="Planted", name="planted", classnames=[str(c) for c in range(10)])
    of = SimpleNamespace(run=run_of(), main=data_set, config=SimpleNamespace(mode="replace"))
    return masking.MainSweep(of, np.arange(N), swept(right))


def test_what_the_variants_do_is_said_in_figures():
    tables = {
        f"{mode}, tokens: {tokens}": curves(swept(planted), draws=50) for mode in Mode for tokens in Tokens
    }
    tables[f"{Mode.REPLACE}, tokens: {Tokens.PATCHES}"] = curves(swept(lambda *_: 0.9), draws=50)
    tables[f"{Mode.ADD_ERROR}, tokens: {Tokens.ALL}"] = curves(swept(lambda *_: 0.43), draws=50)
    still, constant, error = masking_sets.variant_lines(tables)
    assert "by more than 0.0 points" in still and "by more than 0.0 points" in constant
    left = 100 * float(tables[f"{Mode.ADD_ERROR}, tokens: {Tokens.ALL}"].accuracy[0, 0, 0])
    assert f"all latents off {left:.1f} [" in error


def test_class_latents_that_carry_the_class_are_found_and_random_ones_averaged():
    found = main_sweep()
    assert found.middle == [5, 50] and found.fewest == [5, 50] and found.chance == 0.1
    gap = found.gap(CLASS, "random", "on", 5)
    assert gap.low > 0.5 and gap.value == pytest.approx(0.7, abs=0.1)
    both = [found.hits(f"random {n}", "on", 5) for n in (0, 1)]
    assert (found.hits("random", "on", 5) == np.mean(both, 0)).all()
    judged = masking.fig_5(found)
    assert judged.verdict is Verdict.REPRODUCED and judged.label == "fig-5b"
    assert "A class's own latents carry it" in masking.class_lesson(found).text
    assert "at chance" in masking.what_holds(found)[1]


def test_fig_5_differs_where_everywhere_frequent_latents_matter():
    def right(name, switch, k):
        return planted(CLASS if name == "dataset" else name, switch, k)

    judged = masking.fig_5(main_sweep(right))
    assert (judged.verdict, judged.reason) == (Verdict.DIFFERS, Reason.PRESENT)
    assert "Dataset-level latents change accuracy" in judged.why


def test_fig_5_differs_where_a_class_is_no_better_than_random():
    def right(name, switch, k):
        return planted("dataset", switch, k)

    found = main_sweep(right)
    judged = masking.fig_5(found)
    assert (judged.verdict, judged.reason) == (Verdict.DIFFERS, Reason.ABSENT)
    assert "not clearly worth more" in masking.class_lesson(found).text


def test_half_way_is_the_first_size_that_crosses_and_a_dash_below_chance():
    table = curves(swept(planted))
    assert masking_sets.half_way(table, CLASS, "on") == "5"
    assert masking_sets.half_way(table, "dataset", "on") == "1,000"
    assert masking_sets.half_way(table, CLASS, "off") == "5"
    nothing = curves(swept(lambda *_: 0.05))
    assert masking_sets.half_way(nothing, CLASS, "on") == "–"
    told = masking_sets.blind({"base": {"Seen": table}, "novel": {"Unseen": curves(swept(planted, 0.05))}})
    assert "Unseen (novel)" in told and "Seen (base)" not in told


def test_masking_refuses_bad_parameters_before_an_autoencoder_is_trained(monkeypatch):
    monkeypatch.setattr(Run, "trained", property(lambda self: pytest.fail("trained too early")))
    data_set = SimpleNamespace(name="concepts")
    run = Run(
        SimpleNamespace(expansion=8), SimpleNamespace(d_model=16), SimpleNamespace(benchmarks=[data_set]),
        None, Changes({"expansion": None}, {}), 0,
    )  # fmt: skip
    with pytest.raises(PatchSAEError, match="dataset='cars' is unknown; choose of concepts"):
        masking.open_masking(run, MaskingConfig(), "cars", 0.2, 5, 1)
    with pytest.raises(PatchSAEError, match="random=0"):
        masking.open_masking(run, MaskingConfig(random=0), "", 0.2, 5, 1)
    with pytest.raises(PatchSAEError, match="9999"):
        masking.open_masking(run, MaskingConfig(sizes=(9999,)), "", 0.2, 5, 1)
    with pytest.raises(PatchSAEError, match="table_images=1"):
        Settings(table_images=1)


def ranked_of(maple, ranks):
    """Plant how much better MaPLe classifies, and how much its ranking is worth, on both halves."""

    def pair(ranked_by, classified):
        share = 0.4 + maple * (classified == "MaPLe") + ranks * (ranked_by == "MaPLe")
        return swept(lambda name, switch, k: share, seed=1)

    pairs = {setting: pair(*setting) for setting in ranked.SETTINGS}
    a = SimpleNamespace(run=run_of(), by_gain=["s"], tasks={"s": SimpleNamespace(title="S")})
    return ranked.Ranked(a, None, 0, {"base": {"s": pairs}, "novel": {"s": pairs}})


def test_who_classifies_and_who_ranks_are_told_apart():
    found = ranked_of(maple=0.3, ranks=0.0)
    assert ranked.fig_15(found).verdict is Verdict.REPRODUCED
    assert ranked.fig_15(found).ours == pytest.approx(30, abs=5)
    assert ranked.fig_16(found).verdict is Verdict.REPRODUCED and ranked.fig_16(found).ours == 0
    turned = ranked_of(maple=0.0, ranks=0.3)
    assert ranked.fig_15(turned).verdict is not Verdict.REPRODUCED
    assert (ranked.fig_16(turned).verdict, ranked.fig_16(turned).reason) == (
        Verdict.DIFFERS,
        Reason.PRESENT,
    )
    assert "reads more than CLIP" in ranked.fig_15_lesson(ranked.fig_15(found)).text


def by_parts(carrier):
    """Plant a gain that is had by the mixtures with MaPLe's `carrier`."""
    u = np.random.default_rng(0).random(400)
    return {p: (u < (0.8 if getattr(p, carrier) else 0.4)).astype(float) for p in PARTS}


def test_a_gain_is_divided_by_the_part_that_carries_it():
    words = mixtures.divide(by_parts("words"), 0)
    assert words.verdict is Verdict.REPRODUCED and words.mapping.value == words.words.value == 1
    assert words.stream.value == 0 and "as the paper says" in str(words)
    stream = mixtures.divide(by_parts("stream"), 0)
    assert stream.verdict is Verdict.DIFFERS and stream.stream.value == 1
    tokens = mixtures.divide(by_parts("prompt_tokens"), 0)
    assert tokens.mapping.value == 1 and tokens.words.value == 0
    assert CLIP == Parts(0, 0, 0) and MAPLE == Parts(1, 1, 1)


def test_the_lesson_of_remapping_follows_the_division():
    def told(divided):
        return mixtures.remapping_lesson([SimpleNamespace(divided=divided)]).text

    assert "as the paper says" in told(mixtures.divide(by_parts("words"), 0))
    assert "Something else" not in told(mixtures.divide(by_parts("words"), 0))
    against = told(mixtures.divide(by_parts("stream"), 0))
    assert "against the paper" in against and "Something else is seen, too." in against
    assert "cannot be asked" in told(None)


@pytest.mark.parametrize(
    ("start", "same", "keeps"), [(0.9, 0.4, True), (0.3, 0.8, False), (0.9, 0.8, False)]
)
def test_a_dictionary_near_its_start_is_told(start, same, keeps):
    curves_of = {Against.START: start, Against.SEED: same, Against.UNTRAINED: 0.3, Against.PERMUTED: 0.35}
    told = seeds.judge({str(kind): np.full(9, value) for kind, value in curves_of.items()})
    assert told.keeps_start is keeps and told.chance == pytest.approx(0.35)
    alone = seeds.judge({"its own start, before training": np.ones(2), Against.UNTRAINED: np.zeros(2)})
    assert alone.same is None and not alone.keeps_start


def ablation(changes):
    """Make the rows of Table 2 as printed, some numbers times a factor, the twins a little apart."""
    rows = {}
    for name in [*DESIGNS, TWIN]:
        printed = TABLE_2["all tokens" if name == TWIN else name]
        mse, l0 = (factor for factor in changes.get(name, (1, 1)))
        rows[name] = SimpleNamespace(mse=max(printed.mse, 1e-5) * mse, l0=printed.l0 * l0)
    rows["baseline (Fry)"] = SimpleNamespace(mse=rows["CLS, default"].mse * 1.01, l0=30.0)
    origin = {n: "all tokens" if n.startswith("block") else "CLS, default" for n in DESIGNS}
    return SimpleNamespace(
        rows=rows, origin=origin, changed=["λ = 0", "λ × 10", "no ghost", "block 8"],
        noise={"mse": np.log(1.02), "l0": np.log(1.03)}, run=run_of(), full_budget=True,
    )  # fmt: skip


def test_changes_count_only_beyond_the_seed_in_both_tables():
    same = table2.compare_rows(ablation({}))
    assert all(same.agree.values()) and ("λ × 10", "MSE") in same.agree
    # 0.0026 for 0.0026: a change that the paper's own twins exceed says nothing
    assert ("no ghost", "MSE") not in same.agree
    turned = table2.compare_rows(ablation({"λ × 10": (0.01, 100)}))
    assert not turned.agree["λ × 10", "MSE"] and not turned.agree["λ × 10", "L0"]
    judged = table2.table_2(ablation({}), turned)
    assert (judged.verdict, judged.reason) == (Verdict.DIFFERS, Reason.REVERSED)


@pytest.mark.parametrize(
    ("with_", "without", "said"),
    [(0.05, 0.4, "keep them alive"), (0.5, 0.4, "do not keep"), (0.0, 0.1, "hardly die")],
)
def test_ghost_gradients_are_judged_where_latents_die(with_, without, said):
    runs = {
        name: [{"dead_share": share, "fvu": 0.2, "l0": 9.0}] * 12
        for name, share in (("with ghost gradients", with_), ("without", without))
    }
    found = training.Ghost(runs, 2, 0.0)
    assert said in training.ghost_lesson(found).text
    assert "step size × 4, λ × 16" in str(found)


@pytest.mark.parametrize(("kept", "said"), [(99.0, "More"), (80.0, "Less"), (95.2, "hardly does")])
def test_why_it_differs_is_said_only_where_it_does(kept, said):
    one = rebuilt.Scored("All", 500, 9, *(Interval(v, v, v) for v in (100.0, kept, 0.2)), np.arange(3.0))
    found = rebuilt.Rebuilt(SimpleNamespace(sae=SimpleNamespace(d_in=128)), None, SimpleNamespace(l0=20.0))
    assert said in rebuilt.why_kept([one], found)
    assert f"{kept:.1f} % of the accuracy is kept" in rebuilt.kept_lesson([one]).text


def test_the_strongest_latents_are_active_allowed_and_ties_go_to_the_lower_number():
    activation = np.array([0.0, 3.0, 5.0, 3.0, 9.0])
    allowed = np.array([True, True, True, True, False])
    assert localization.strongest(activation, allowed, 3).tolist() == [2, 1, 3]
    assert localization.strongest(np.zeros(5), allowed).tolist() == []


def test_the_marked_patch_is_the_middle_of_the_object():
    cover = np.zeros((5, 5))
    cover[1:4, 1:4] = 1
    assert localization.middle_patch(cover.ravel(), 5) == 12
