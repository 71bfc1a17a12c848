"""Chapter 4 beyond Fig. 5(b): other modes and tokens, every data set, base and novel, single classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from patchbook.chapters.masking import SIGNS, MainSweep, Masking, cell
from patchbook.tables import Table, fixed, percent
from patchsae.images.sets import Dataset
from patchsae.masking.masked_tokens import Mode
from patchsae.masking.rankings import CLASS, PREDICTED
from patchsae.masking.sweep import MaskingConfig, curves
from patchsae.masking.through import per_class_accuracy
from patchsae.training.activations import Tokens

Halves = Mapping[str, Mapping[str, xr.Dataset]]


def variants(of: Masking, images: int) -> dict[str, xr.Dataset]:
    """Return curves of every way to put tokens back, for every choice of the tokens that are replaced."""
    sample, found = of.run.few(of.main.test, images), {}
    for tokens in Tokens:
        for mode in Mode:
            config = MaskingConfig(
                sizes=of.config.sizes, mode=mode, tokens=tokens, random=of.config.random, seed=of.run.seed
            )
            swept = of.sweep(of.main.name, sample, config=config)
            found[f"{mode}, tokens: {tokens}"] = curves(swept, seed=of.run.seed, draws=500)
    return {name: found[name] for name in (f"{m}, tokens: {t}" for m in Mode for t in Tokens)}


def variant_lines(found: Mapping[str, xr.Dataset]) -> list[str]:
    """Say what the choice of tokens and of how they are put back does to accuracy, of `variants`."""
    whole = {mode: found[f"{mode}, tokens: {Tokens.ALL}"] for mode in Mode}
    patches = found[f"{Mode.REPLACE}, tokens: {Tokens.PATCHES}"]
    moved = 100 * float(abs(patches.accuracy - patches.attrs["original"].value).max())
    apart = 100 * float(abs(whole[Mode.REPLACE].accuracy - whole[Mode.REPLACE_BIAS].accuracy).max())
    last = int(patches.k.values[-1])
    nothing = percent(cell(whole[Mode.ADD_ERROR], CLASS, "off", last))
    return [
        f"Where patches alone are replaced, no mask moves accuracy by more than {moved:.1f} points.",
        f"Between replacing tokens with and without the constant, no mask differs by more than {apart:.1f} "
        "points.",
        f"With the error added back and all latents off {nothing} % are still right: so much of the class "
        "is in what the autoencoder leaves over.",
    ]


def split_table(found: MainSweep, images: int) -> Table:
    """Return both class rankings on training images that they were made from, and on test images."""
    of, seed = found.of, found.of.run.seed
    train = of.main.train
    ranked_on = of.run.few(train.per_class(of.rank_images) if of.rank_images else train, images)
    seen = curves(of.sweep(of.main.name, ranked_on), seed=seed)
    rows: dict[tuple, dict] = {}
    for switch in SIGNS:
        for split, table in (("training images", seen), ("test images", found.table)):
            for name in (CLASS, PREDICTED):
                rows[switch, name, split] = {
                    f"k = {k:,}": percent(cell(table, name, switch, k), 0) for k in found.sizes
                }
    for split, table in (("training images", seen), ("test images", found.table)):
        rows["no mask", "", split] = {f"k = {found.sizes[-1]:,}": percent(table.attrs["original"], 0)}
    caption = "Accuracy in % where latents were ranked on the scored images, and where not."
    return Table(caption, rows, ("switch", "ranking", "scored on"), folded=True)


def halves(of: Masking, images: int) -> Halves:
    """Return curves of base and of novel classes of every data set."""
    found: dict[str, dict] = {"base": {}, "novel": {}}
    for d in of.chosen:
        first = len(d.base().classnames)
        for half, part, keep in (
            ("base", d.base(), slice(0, first)),
            ("novel", d.novel(), slice(first, None)),
        ):
            swept = of.sweep(d.name, of.run.few(part.test, images), keep)
            found[half][d.title] = curves(swept, seed=of.run.seed, draws=1000)
    return found


def half_way(table: xr.Dataset, ranking: str, switch: str) -> str:
    """Return the smallest k at which accuracy crosses half of the identity mask's, if that beats chance."""
    last = int(table.k[-1])
    if cell(table, CLASS, "on", last).low <= 1 / table.attrs["classes"]:
        return "–"
    row = table.sel(ranking=ranking, switch=switch)
    goal = float(table.accuracy.sel(ranking=ranking, switch="on").isel(k=-1)) / 2
    crossed = row.accuracy >= goal if switch == "on" else row.accuracy <= goal
    return f"{int(row.k[crossed.values.argmax()]):,}" if crossed.any() else "–"


def half_table(found: Halves) -> Table:
    """Return accuracy on every half, and the k at which half of the identity mask's is reached or lost."""
    rows: dict[tuple, dict] = {}
    for half, by_title in found.items():
        for title, table in by_title.items():
            last = int(table.k[-1])
            line = {
                ("accuracy %", "original"): percent(table.attrs["original"]),
                ("accuracy %", "all on"): percent(cell(table, CLASS, "on", last)),
                ("accuracy %", "all off"): percent(cell(table, CLASS, "off", last)),
                ("accuracy %", "chance"): fixed(100 / table.attrs["classes"], 1),
            }
            for switch in SIGNS:
                for ranking in map(str, table.ranking.values):
                    line[f"k at half, {switch}", ranking] = half_way(table, ranking, switch)
            rows[half, title] = line
    caption = (
        "Accuracy on each half, and k at which half of the identity mask's is reached (on) or lost (off)."
    )
    return Table(caption, rows, ("classes", "data set"), folded=True)


def blind(found: Halves) -> str:
    """Say on which data sets the unmasked model does not beat chance, where masks show nothing."""
    names = [
        f"{title} ({half})"
        for half, by_title in found.items()
        for title, table in by_title.items()
        if table.attrs["original"][1] <= 1 / table.attrs["classes"]
    ]
    if not names:
        return "The unmasked model clearly beats chance on all of them."
    return (
        f"The unmasked model does not clearly beat chance on: {', '.join(names)}. There is no knowledge to "
        "take away, so masks show nothing about it there."
    )


class ByClass(NamedTuple):
    """What each class of one data set loses without its own highest latents."""

    subject: Dataset
    swept: xr.Dataset
    taken: int
    """How many latents are off: where the change is largest on average."""
    measured: np.ndarray
    """Classes with test images [C]."""
    images: np.ndarray
    """Test images of every class."""
    base_line: np.ndarray
    """Accuracy with all latents on [C]."""
    change: np.ndarray
    """Accuracy with `taken` of them off minus that [C]."""

    def __str__(self) -> str:
        never = int((self.base_line == 0).sum())
        return (
            f"{self.subject.title}: {len(self.measured)} classes, {int(self.images.sum()):,} test images; "
            f"{never} classes never right with all latents on are not listed"
        )


def by_class(found: MainSweep, sets: Halves, images: int) -> ByClass:
    """Ask the data set with the fewest classes, of those that the unmasked model gets right mostly."""
    of = found.of
    able = [d for d in of.chosen if sets["base"][d.title].attrs["original"][0] > 0.5] or of.chosen
    subject = min(able, key=lambda d: len(d.classnames))
    swept = of.sweep(subject.name, of.run.few(subject.test, images))
    labels = swept.label.values
    n = np.bincount(labels, minlength=len(subject.classnames))
    measured, oracle = np.flatnonzero(n), (swept["rank"] == 0).sel(ranking=CLASS)

    def mean(values: np.ndarray) -> np.ndarray:
        return (np.bincount(labels, values, len(n)) / np.maximum(n, 1))[measured]

    some = [k for k in found.middle if k <= of.run.sae.d_sae / 20] or found.sizes[:1]
    taken = min(some, key=lambda k: float(oracle.sel(switch="off", k=k).mean()))
    base_line = mean(oracle.sel(switch="on", k=found.sizes[-1]).values)
    change = mean(oracle.sel(switch="off", k=taken).values) - base_line
    return ByClass(subject, swept, taken, measured, n, base_line, change)


def change_table(of: Masking, found: ByClass) -> Table:
    """Return the classes that lose most and least, with the highest latents of each."""
    counts = of.atlases[found.subject.name].class_count.values
    able = np.flatnonzero(found.base_line > 0)
    order = able[np.argsort(found.change[able], kind="stable")]
    ends = np.concatenate([order[:6], order[::-1][:4]])
    rows = {}
    for i in dict.fromkeys(ends.tolist()):
        c = found.measured[i]
        rows[found.subject.classnames[c]] = {
            "test images": found.images[c],
            "all on %": fixed(100 * found.base_line[i]),
            f"change with top {found.taken} off, points": fixed(100 * found.change[i]),
            "highest latents": ", ".join(map(str, np.argsort(-counts[c], kind="stable")[:5])),
        }
    return Table("Classes that lose most and least.", rows, ("class",), folded=True)


def accuracy_by_class(found: ByClass) -> Table:
    """Return every class's accuracy without a mask and with all latents on, the ten lowest and highest."""
    whole = found.swept["rank"].sel(ranking=CLASS, switch="on").isel(k=-1).values
    of = {"no mask": found.swept.original_rank.values, "all on": whole}
    labels, among = found.swept.label.values, len(found.subject.classnames)
    each = {
        (name, f"top-{top}"): per_class_accuracy(rank, labels, among, top)
        for name, rank in of.items()
        for top in (1, 5)
    }
    first = each["no mask", "top-1"].value[found.measured]
    order = found.measured[np.argsort(first, kind="stable")]
    ends: Sequence[int] = list(dict.fromkeys([*order[:10].tolist(), *order[-10:].tolist()]))
    means = ", ".join(
        f"{name} {top} {100 * np.nanmean(values.value):.1f} %" for (name, top), values in each.items()
    )
    rows = {
        found.subject.classnames[c]: {("", "test images"): found.images[c]}
        | {
            (f"{name}, %", top): percent([bound[c] for bound in values], 0)
            for (name, top), values in each.items()
        }
        for c in ends
    }
    caption = f"The ten classes with the lowest and with the highest accuracy. Means of all: {means}."
    return Table(caption, rows, ("class",), folded=True)
