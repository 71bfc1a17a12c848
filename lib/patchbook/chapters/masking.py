"""Chapter 4: what is left of the prediction when only some latents write; Fig. 5(b, c), 15 and 16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from torch import Tensor

from patchbook.chapters.opening import MEMORY, Run, pictures
from patchbook.chapters.verdicts_of_models import all_of, is_within, masks_tell
from patchbook.lessons import Lesson, lesson
from patchbook.report import Finding, Verdict, finding
from patchbook.tables import Estimate, Table, fixed, in_percent, percent
from patchsae.images.sets import Dataset, ImageSet
from patchsae.latents.atlas import AtlasConfig
from patchsae.masking.rankings import CLASS, PREDICTED
from patchsae.masking.sweep import MaskingConfig, all_sizes, curves, sweep
from patchsae.masking.through import per_class_accuracy
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval, bootstrap, bootstrap_ratio, wilson
from patchsae.sae.model import SAEConfig

SIGNS = {"on": 1, "off": -1}
"""On which side of 0 a ranking's gap to another is an effect."""
MARGIN = 0.05
"""Within which data-set-level latents count as no better than random ones, 0 … 1."""


@dataclass(frozen=True)
class Masking:
    """The data sets of a run, with latents counted for each class."""

    run: Run
    config: MaskingConfig
    chosen: list[Dataset]
    atlases: Mapping[str, xr.Dataset]
    texts: Mapping[str, Tensor]
    rank_images: int

    @property
    def main(self) -> Dataset:
        """Return the data set of Fig. 5(b)."""
        return self.chosen[0]

    def sweep(
        self, name: str, images: ImageSet, keep: slice = np.s_[:], config: MaskingConfig | None = None
    ) -> xr.Dataset:
        """Mask images of a data set, or of some of its classes, under every ranking."""
        atlas = self.atlases[name] if keep == np.s_[:] else self.atlases[name].isel(klass=keep)
        run = self.run
        return sweep(
            run.sae, run.backbone, images, self.texts[name][keep], atlas, config or self.config, run.root,
            run.sae_hash,
        )  # fmt: skip

    def ranked_table(self) -> Table:
        """Return on how many images latents are ranked, and how many of them fire for a class."""
        rows = {
            d.title: {
                "classes": len(d.classnames),
                "images ranked on": self.atlases[d.name].attrs["images"],
                "latents above τ per class, median": int(
                    np.median((self.atlases[d.name].class_count.values > 0).sum(1))
                ),
            }
            for d in self.chosen
        }
        return Table("What latents are ranked on.", rows, ("data set",), folded=True)


def open_masking(
    run: Run, config: MaskingConfig, dataset: str, tau: float, references: int, rank_images: int
) -> Masking:
    """Count, for every class of each data set, the tokens on which latents are above τ.

    Raises
    ------
    PatchSAEError : before anything is computed, for an unknown data set, too large a size, or no random
        ranking to compare with.
    """
    if config.random < 1:
        raise PatchSAEError(
            f"random={config.random} leaves nothing to compare with; take at least 1 random ranking."
        )
    chosen = run.choose(dataset)
    expansion = run.changes.sae["expansion"] or run.setup.expansion
    all_sizes(config.sizes, SAEConfig(run.backbone.d_model, expansion).d_sae)
    run.backbone.remember(MEMORY)
    atlases, texts = {}, {}
    for d in chosen:
        train = d.train.per_class(rank_images) if rank_images else d.train
        atlases[d.name] = run.atlas(train, AtlasConfig(tau=tau, k=references))
        texts[d.name] = run.text(d)
    return Masking(run, config, chosen, atlases, texts, rank_images)


def cell(table: xr.Dataset, ranking: str, switch: str, k: int) -> Interval:
    """Return an accuracy of `curves` with its interval."""
    here = table.sel(ranking=ranking, switch=switch, k=k)
    return Interval(float(here.accuracy), float(here.low), float(here.high))


@dataclass(frozen=True)
class MainSweep:
    """Fig. 5(b): the main data set under every mask."""

    of: Masking
    tested: ImageSet
    result: xr.Dataset

    @cached_property
    def table(self) -> xr.Dataset:
        """Return top-1 accuracy."""
        return curves(self.result, seed=self.of.run.seed)

    @cached_property
    def top5(self) -> xr.Dataset:
        """Return top-5 accuracy."""
        return curves(self.result, top=5, seed=self.of.run.seed)

    @property
    def title(self) -> str:
        """Name the panel."""
        return f"{self.of.main.title}, {len(self.tested):,} test images, mode {self.of.config.mode}"

    @property
    def sizes(self) -> list[int]:
        """Return all numbers of latents."""
        return self.table.k.values.tolist()

    @property
    def middle(self) -> list[int]:
        """Return the numbers below all latents."""
        return [k for k in self.sizes if k < self.of.run.sae.d_sae]

    @property
    def fewest(self) -> list[int]:
        """Return the numbers up to a tenth of the latents."""
        return [k for k in self.middle if k <= self.of.run.sae.d_sae / 10] or self.middle[:1]

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing."""
        return 1 / len(self.of.main.classnames)

    @cached_property
    def ranks(self) -> dict[str, np.ndarray]:
        """Return the rank of the true class without a mask, with all latents on, and with all off."""
        whole = self.result["rank"].sel(ranking=CLASS).isel(k=-1)
        return {
            "original": self.result.original_rank.values,
            "on": whole.sel(switch="on").values,
            "off": whole.sel(switch="off").values,
        }

    def nothing(self, top: int = 1) -> Interval:
        """Return the accuracy with all latents off, with an interval that is honest near 0."""
        return wilson((self.ranks["off"] < top).sum(), len(self.tested))

    @property
    def kept(self) -> Interval:
        """Return the share of the accuracy that all latents keep."""
        return bootstrap_ratio(self.ranks["on"] == 0, self.ranks["original"] == 0, self.of.run.seed)

    def hits(self, ranking: str, switch: str, k: int) -> np.ndarray:
        """Return which images are right: [N]; random rankings averaged."""
        names = [str(name) for name in self.result.ranking.values]
        same = [n for n in names if n == ranking or (ranking == "random" and n.startswith("random"))]
        right = self.result["rank"].sel(ranking=same, switch=switch, k=k) == 0
        return right.transpose("ranking", "image").values.mean(0)

    def gap(self, a: str, b: str, switch: str, k: int) -> Interval:
        """Return by how much one ranking is ahead of another on the same images."""
        return bootstrap(self.hits(a, switch, k) - self.hits(b, switch, k), self.of.run.seed)


def main_sweep(of: Masking, images: int) -> MainSweep:
    """Mask test images of the main data set."""
    tested = of.run.few(of.main.test, images)
    return MainSweep(of, tested, of.sweep(of.main.name, tested))


def levels_table(found: MainSweep) -> Table:
    """Return accuracy without a mask, with all latents on, with all off, and chance."""
    labels, classes = found.result.label.values, len(found.of.main.classnames)
    recall = {
        name: fixed(100 * np.nanmean(per_class_accuracy(rank, labels, classes).value), 1)
        for name, rank in found.ranks.items()
    }
    last, chance = found.sizes[-1], found.chance
    whole, whole5 = (cell(of, CLASS, "on", last) for of in (found.table, found.top5))
    heads = ("top-1 %", "top-5 %", "recall %", "paper, ImageNet top-1 %")
    rows = {
        "original": (percent(found.table.attrs["original"]), percent(found.top5.attrs["original"]),
                     recall["original"], "68.25"),
        "identity mask (all on)": (percent(whole), percent(whole5), recall["on"], "64.82"),
        "all off": (percent(found.nothing()), percent(found.nothing(5)), recall["off"], "0.1"),
        "chance": (fixed(100 * chance, 2), fixed(500 * chance, 2), fixed(100 * chance, 2), "0.1"),
    }  # fmt: skip
    cells = {name: dict(zip(heads, row, strict=True)) for name, row in rows.items()}
    return Table("Accuracy with every latent, and with none.", cells, ("mask",))


def curve_table(found: MainSweep) -> Table:
    """Return the curves as numbers, and by how many points each ranking is ahead of random latents."""
    rows: dict[tuple, dict] = {}
    for switch in SIGNS:
        for name in map(str, found.table.ranking.values):
            rows[switch, name, "accuracy"] = {
                f"k = {k:,}": percent(cell(found.table, name, switch, k), 0) for k in found.middle
            }
            if name != "random" and "gain" in found.table:
                part, of = found.table.sel(ranking=name, switch=switch), ("gain", "gain_low", "gain_high")
                rows[switch, name, "minus random"] = {
                    f"k = {k:,}": percent([float(part[v].sel(k=k)) for v in of], 0) for k in found.middle
                }
    caption = "The curves as numbers, in %; for 'off' a negative difference is the stronger effect."
    return Table(caption, rows, ("switch", "ranking", "number"), folded=True)


def what_holds(found: MainSweep) -> list[str]:
    """Say which gaps between rankings are clear, and at which k."""
    nothing, chance = found.nothing(), found.chance
    at_chance = nothing.low <= chance <= nothing.high
    lines = [
        f"All latents on keep {percent(found.kept, 0)} % of the accuracy (paper: "
        f"{100 * 64.82 / 68.25:.0f} %).",
        f"With all latents off, accuracy is {percent(nothing, 2)} %: "
        + ("at chance." if at_chance else f"**not at chance**, {100 * chance:.2f} %."),
    ]
    for switch in SIGNS:
        for against in ("dataset", "random"):
            k, gap, clear = _clear(found, CLASS, against, switch)
            lines.append(
                f"{switch} top-k, class (oracle) against {against} at equal k: largest difference {gap} "
                f"points at k = {k:,}; clear at k = {clear}."
            )
        k, gap, clear = _clear(found, PREDICTED, "dataset", switch)
        lines.append(
            f"{switch} top-k without the oracle, class (predicted) against dataset: largest difference "
            f"{gap} points at k = {k:,}; clear at k = {clear}."
        )
    return [*lines, *_more(found)]


def _clear(found: MainSweep, name: str, against: str, switch: str) -> tuple[int, Estimate, str]:
    sign = SIGNS[switch]
    gaps = {k: found.gap(name, against, switch, k) for k in found.middle}
    k = max(gaps, key=lambda k: sign * gaps[k].value)
    clear = [f"{k:,}" for k, gap in gaps.items() if min(sign * gap.low, sign * gap.high) > 0]
    return k, percent(gaps[k]), ", ".join(clear) or "none"


def _from_dataset(found: MainSweep) -> dict[str, list[Interval]]:
    """Return data-set-level minus random latents by switch, for every k up to a tenth of the latents."""
    return {switch: [found.gap("dataset", "random", switch, k) for k in found.fewest] for switch in SIGNS}


def _more(found: MainSweep) -> list[str]:
    """Say what data-set-level latents do, and what knowing the answer is worth."""
    from_dataset = _from_dataset(found)
    worst = all_of(*(is_within(g, MARGIN) for gaps in from_dataset.values() for g in gaps)).verdict
    largest = {s: percent(max(gaps, key=lambda g: abs(g.value))) for s, gaps in from_dataset.items()}
    effect = {
        Verdict.REPRODUCED: "within 5 points at every k: marginal, as in the paper",
        Verdict.DIFFERS: "clearly beyond 5 points at some k: **not marginal, unlike the paper**",
        Verdict.OPEN: "neither clearly within 5 points nor clearly beyond",
    }[worst]
    before = found.ranks["original"] == 0
    ahead = {k: bootstrap(found.hits(CLASS, "on", k) - before, found.of.run.seed) for k in found.middle}
    better = [f"{k:,}" for k, gap in ahead.items() if gap.low > 0]
    told = {k: found.gap(CLASS, PREDICTED, "on", k) for k in found.middle}
    most = max(told, key=lambda k: told[k].value)
    return [
        f"Data set against random, up to k = {found.fewest[-1]:,}: largest difference {largest['on']} "
        f"points on, {largest['off']} points off, {effect}.",
        f"Oracle against predicted class, on top-k: largest gain {percent(told[most])} points at "
        f"k = {most:,}; the unmasked model is right on {percent(found.table.attrs['original'])} % of the "
        "images.",
        "The oracle's mask is clearly ahead of the unmasked model "
        + (f"at k = {', '.join(better)}: the mask says the answer." if better else "at no k."),
    ]


def fig_5(found: MainSweep) -> Finding:
    """Judge Fig. 5."""
    of_class = {s: [found.gap(CLASS, "random", s, k) for k in found.fewest] for s in SIGNS}
    class_ahead = [
        any(min(sign * gap.low, sign * gap.high) > 0 for gap in of_class[switch])
        for switch, sign in SIGNS.items()
    ]
    others = [gap for gaps in _from_dataset(found).values() for gap in gaps]
    return finding(
        "Fig. 5",
        label="fig-5b",
        claim="All latents on keep most of the accuracy, all off leave chance; class-level latents matter, "
        "random and dataset-level ones little.",
        quantity="accuracy with all latents on, share of the original's",
        paper=100 * 64.82 / 68.25,
        ours=in_percent(found.kept),
        unit="%",
        rule="the interval of all latents off holds chance, class-level latents are clearly ahead of "
        "random ones (on and off) at some k, and the intervals of dataset-level against random ones lie "
        "within 5 points at every k, up to a tenth of the latents",
        **masks_tell(found.nothing(), found.chance, class_ahead, others, MARGIN)._asdict(),
        effect=100 * max(gap.value for gap in of_class["on"]),
        effect_name="points by which class-level latents on are ahead of random ones, at the best k up to "
        "a tenth of the latents",
    )


def kept_lesson(found: MainSweep) -> Lesson:
    """Say in one sentence what all latents keep, and what none of them leaves."""
    text = (
        f"With all latents on the model keeps {percent(found.kept, 0)} % of its accuracy on "
        f"{found.of.main.title}; with none it is right on {percent(found.nothing())} %, where chance is "
        f"{100 * found.chance:.1f} %."
    )
    return Lesson(text, "fig-5b", 2)


def class_lesson(found: MainSweep) -> Lesson:
    """Say in one sentence what a class's own latents are worth, against random ones."""
    on, off = (_clear(found, CLASS, "random", switch) for switch in SIGNS)
    gap = found.gap(CLASS, "random", "off", off[0])
    lost = percent(Interval(-gap.value, -gap.high, -gap.low))
    worth = (
        f"A class's own latents carry it: at k = {on[0]:,} they are {on[1]} points ahead of as many random "
        f"ones, and with them off accuracy is {lost} points lower than with random ones off "
        f"(k = {off[0]:,})."
    )
    nothing = (
        f"A class's own latents are not clearly worth more than random ones: at best {on[1]} points with "
        f"them on (k = {on[0]:,}), {off[1]} with them off (k = {off[0]:,})."
    )
    return Lesson(nothing if "none" in (on[2], off[2]) else worth, "fig-5b", 1)


def dataset_lesson(found: Finding) -> Lesson:
    """Say in one sentence whether the whole of Fig. 5 holds."""
    return lesson(
        found, 3,
        holds="Random latents and those frequent everywhere matter little, as in the paper.",
        fails=f"Not all of the paper's Figure 5 holds. {found.why}",
        open_=f"Not all of the paper's Figure 5 is decided. {found.why}",
    )  # fmt: skip


def examples(found: MainSweep) -> tuple | None:
    """Return what a figure of masked predictions takes: two images that are right, two that are wrong."""
    labels, right = found.result.label.values, found.ranks["original"] == 0
    places: list[int] = []
    for those in (right & (found.ranks["on"] == 0), ~right):
        firsts = [np.flatnonzero(those & (labels == c))[0] for c in np.unique(labels[those])]
        places += [*firsts[:1], *firsts[1:][-1:]]
    if not places:
        return None
    masks = [(switch, name) for switch in SIGNS for name in (CLASS, PREDICTED, "dataset", "random 0")]
    said = [
        found.result.prediction.sel(ranking=name, switch=switch).isel(image=places).values
        for switch, name in masks
    ]
    said, names = np.stack(said, 1), np.array(found.of.main.classnames, dtype=object)
    return (
        pictures(found.tested.load(places).images), [names[label] for label in labels[places]], names[said],
        said == labels[places][:, None, None], [f"{switch}, {name}" for switch, name in masks],
        [f"k = {k:,}" for k in found.sizes],
    )  # fmt: skip
