"""Table 1 and what stands beside it: accuracy, groups of latents, and prompts of several seeds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from patchbook.chapters.adaptation.tasks import CLIP, MAPLE, Adaptation, Half, Task, hits, in_words
from patchbook.chapters.published import TABLE_1
from patchbook.chapters.verdicts_of_models import Unseen, better_and_high, ratio, unseen_gains_more
from patchbook.lessons import Lesson, lesson
from patchbook.report import Beyond, Finding, Verdict, beyond, finding
from patchbook.scenes.catalogue import trained_mask
from patchbook.scenes.sprites import STYLES
from patchbook.tables import Table, fixed, in_percent, percent
from patchsae.adaptation.remapping import group_table, improvement_rate
from patchsae.clip.backbone import zero_shot_weights
from patchsae.images.benchmark_table import RECIPES
from patchsae.runs.intervals import bootstrap, mcnemar

MODELS = {"CLIP": CLIP, "MaPLe": MAPLE}
REGIONS = ("high", "high_to_low", "low_to_high")


def accuracy_table(a: Adaptation) -> Table:
    """Return accuracy on both halves of each data set, as they are and through the SAE (Table 1, right)."""
    rows, seed = {}, a.run.seed
    for name in a.by_gain:
        t = a.tasks[name]
        for place, (half, about) in enumerate(t.halves.items()):
            line: dict[tuple[str, str], object] = {("", "chance"): fixed(100 * about.chance, 1)}
            for kind, latents in (("original", False), ("through SAE", True)):
                for label, parts in MODELS.items():
                    line[kind, label] = percent(bootstrap(t.right(half, parts, latents), seed))
            shares = [t.right(half, parts).mean() for parts in MODELS.values()]
            line["", "Δ %"] = fixed(100 * improvement_rate(*shares), 1)
            if row := TABLE_1.get(name):
                for label in MODELS:
                    ours, theirs = (getattr(row, f"{of}{label.lower()}") for of in ("", "official_"))
                    line["paper", label] = fixed(ours[place], 2)
                    line["MaPLe's authors", label] = fixed(theirs[place], 2)
            rows[t.title, half] = line
    caption = "Accuracy in % on test images, with 95 % intervals over images."
    return Table(caption, rows, ("data set", "classes"))


def region_table(a: Adaptation) -> Table:
    """Return how many latents per class are in each region, by both readings (Table 1, left)."""
    rows = {}
    for name in a.by_gain:
        t = a.tasks[name]
        for half, about in t.halves.items():
            before, after = ({name: counts[about.keep]} for counts in t.counts)
            line = rows.setdefault((t.title, half), {})
            for (_, reading), found in group_table(before, after).items():
                for group, size in found.items():
                    line[f"by {reading}", group.replace("_", "-")] = fixed(size, 2)
    caption = "Latents per class in each region, mean over classes."
    return Table(caption, rows, ("data set", "classes"), folded=True)


def gain_table(a: Adaptation) -> Table:
    """Return the gain of each data set, with an exact test on its base classes."""
    rows = {}
    for name in a.by_gain:
        t = a.tasks[name]
        found = mcnemar(t.right("base", CLIP), t.right("base", MAPLE))
        rows[t.title] = {
            "gain on base, points": percent(a.gain[name]),
            "only CLIP right": found.only_first,
            "only MaPLe right": found.only_second,
            "p (McNemar)": f"{found.p:.1e}" if found.p < 0.001 else f"{found.p:.3f}",
            "gain on novel, points": percent(bootstrap(t.moved("novel"), a.run.seed)),
        }
    return Table("What MaPLe gains in accuracy.", rows, ("data set",))


def seed_table(a: Adaptation, prompt_seed: int) -> Table | None:
    """Return accuracy of prompts learned with several seeds on Table 1's images; None without them."""
    rows, seed = {}, a.run.seed
    for name, t in a.tasks.items():
        others = [model for n in (1, 2, 3) if n != prompt_seed and (model := a.prompts(name, n))]
        if not others:
            continue
        about = t.halves["base"]
        test, named = about.test, about.part.classnames
        before, known = (t.right("base", parts).astype(float) for parts in MODELS.values())
        (untrained,) = hits(a.run, a.run.backbone, test, untrained_text(a, t, about))
        found = np.stack([known, *(hits(a.run, m, test, m.class_weights(named))[0] for m in others)])
        rows[t.title] = {
            "test images": len(test),
            "CLIP": percent(bootstrap(before, seed)),
            "CLIP, MaPLe's untrained prompt": percent(bootstrap(untrained, seed)),
            "MaPLe, mean of seeds": percent(bootstrap(found.mean(0), seed)),
            "sd over seeds": fixed(100 * found.mean(1).std(ddof=1), 1),
            "gain, points": percent(bootstrap(found.mean(0) - before, seed)),
            "gain over the untrained prompt": percent(bootstrap(found.mean(0) - untrained, seed)),
        }
    caption = "Accuracy in % on base classes, prompts of several seeds."
    return Table(caption, rows, ("data set",), folded=True) if rows else None


def untrained_text(a: Adaptation, task: Task, half: Half):
    """Return CLIP's text vectors with the words that MaPLe starts from, in place of the set's prompt."""
    template = task.model.prompts.config.text("{}")
    return zero_shot_weights(a.run.backbone, half.part.classnames, template)


def table_1(a: Adaptation) -> Finding:
    """Judge Table 1."""
    gain, on_novel = a.over_sets(Task.moved), a.over_sets(lambda t: t.moved("novel"))
    sizes = {g: np.mean([t.sizes[g].mean() for t in a.tasks.values()]) for g in REGIONS}
    judged = better_and_high(gain, sizes)
    before, after = (
        np.mean([t.right("base", parts).mean() for t in a.tasks.values()]) for parts in MODELS.values()
    )
    printed = a.published.values()
    theirs = np.mean([row.maple[1] - row.clip[1] for row in printed])
    return finding(
        "Table 1",
        claim="MaPLe is better on base classes; most latents that are high for a class are so in both "
        "models.",
        quantity="gain on base classes, mean of data sets",
        unit="points",
        paper=float(np.mean([row.maple[0] - row.clip[0] for row in printed])),
        ours=in_percent(gain),
        rule="the interval lies above 0 and more latents per base class are high than off the diagonal",
        verdict=judged.verdict,
        reason=judged.reason,
        effect=ratio(after - before, 1 - before),
        effect_name="Δ: share of CLIP's errors that MaPLe removes",
        why=f"{judged.why} Latents per base class: {in_words(sizes)}. On novel classes accuracy changes by "
        f"{percent(on_novel)} points (the paper: {fixed(theirs, 1, sign=True)}).".strip(),
    )


def table_1_lesson(found: Finding, a: Adaptation) -> Lesson:
    """Say what Table 1 is in this run, and what adaptation does to classes that it did not see."""
    novel = (
        f" On novel classes accuracy changes by {percent(a.over_sets(lambda t: t.moved('novel')))} points."
    )
    return lesson(
        found, 2,
        holds="MaPLe is better than CLIP on base classes, by {}, while most latents that are high for a "
        "class stay high." + novel,
        fails="Table 1 does not hold here: MaPLe's gain on base classes is {}, or more "
        "latents leave the diagonal than stay on it." + novel,
        open_="Whether MaPLe gains on base classes is not clear in this run: {}." + novel,
    )  # fmt: skip


def seen_lesson(pairs: Pairs) -> Lesson:
    """Say on which pairs of a concept and a style adaptation gains."""
    told = pairs.unseen.judged
    so = " So adaptation pays here where CLIP had not seen the look."
    return Lesson(told.why + so * (told.verdict is Verdict.REPRODUCED), "seen-and-unseen", 3)


def published_table() -> Table:
    """Return the paper's Table 1 and the accuracies that MaPLe's authors published, base / novel."""
    fields = {
        "high": "high", "high-to-low": "high_to_low", "low-to-high": "low_to_high", "paper: CLIP %": "clip",
        "paper: MaPLe %": "maple", "MaPLe's authors: CLIP %": "official_clip",
        "MaPLe's authors: MaPLe %": "official_maple",
    }  # fmt: skip
    rows = {
        RECIPES[name].title: {
            title: "{:.2f} / {:.2f}".format(*getattr(row, field)) for title, field in fields.items()
        }
        for name, row in TABLE_1.items()
    }
    caption = "Published numbers for photographs, base / novel."
    return Table(caption, rows, ("data set",), folded=True)


class Pairs(NamedTuple):
    """Gain on base classes by whether CLIP was trained on the pair of concept and style."""

    rows: dict[str, dict[str, object]]
    pools: dict[bool, np.ndarray]
    """Gain per image, pairs seen (True) and never seen (False)."""
    unseen: Unseen


def seen_and_unseen(a: Adaptation) -> Pairs | None:
    """Divide the gain on base classes by whether CLIP saw the pair; None where that is not known."""
    rows, pools = {}, {True: [], False: []}
    for t in a.tasks.values():
        seen = _seen_before(t)
        if seen is None:
            continue
        labels, change, line = t.halves["base"].test.labels, t.moved(), {}
        for before, title in ((True, "seen in training"), (False, "never seen")):
            here = seen[labels] == before
            pools[before].append(change[here])
            line[title, "classes"] = len(np.unique(labels[here]))
            line[title, "gain, points"] = (
                percent(bootstrap(change[here], a.run.seed)) if here.any() else "–"
            )
        rows[t.title] = line
    if not rows:
        return None
    both = {key: np.concatenate(values) for key, values in pools.items()}
    return Pairs(rows, both, unseen_gains_more(both[True], both[False], a.run.seed))


def _seen_before(t: Task) -> np.ndarray | None:
    """Tell for each base class whether CLIP was trained on it in the data set's style; None if unknown."""
    labels, styles = (getattr(t.data_set.train, name, None) for name in ("concept_of_label", "styles"))
    if labels is None or len(styles) != 1:
        return None
    return trained_mask()[styles[0]][labels] if styles[0] < len(STYLES) else np.zeros(len(labels), bool)


def pair_table(pairs: Pairs) -> Table:
    """Return the gain by data set and by whether the pair was seen."""
    return Table("Gain on base classes, by pair of concept and style.", pairs.rows, ("data set",))


def seen_finding(pairs: Pairs) -> Beyond:
    """Judge that adaptation gains more on pairs that CLIP never saw."""
    unseen = pairs.unseen
    return beyond(
        "Adaptation gains more on pairs of concept and style that CLIP never saw than on those it saw",
        label="seen-and-unseen",
        quantity="gain in accuracy by MaPLe on base classes, pairs never seen minus pairs seen",
        ours=unseen.found,
        unit="points",
        rule="the interval of the difference lies above 0",
        **unseen.judged._asdict(),
        effect=unseen.effect,
        effect_name="Cohen's d of the gain per image, unseen against seen",
    )
