"""Other ways to adapt: words or image tokens alone (CoOp, VPT), CLIP's own weights (LoRA, all of them)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from patchbook.chapters.adaptation.accuracy import untrained_text
from patchbook.chapters.adaptation.mixtures import Divided, divide
from patchbook.chapters.adaptation.tasks import CLIP, MAPLE, Adaptation, Task, hits
from patchbook.chapters.opening import MEMORY
from patchbook.chapters.verdicts_of_models import Judged, is_above
from patchbook.report import Beyond, Reason, Verdict, above, beyond
from patchbook.tables import Table, fixed, in_percent, percent
from patchsae.adaptation.prompts import Method
from patchsae.adaptation.remapping import Mixed, Parts, class_counts, compare_counts, mix_models
from patchsae.adaptation.weights import Change
from patchsae.clip.backbone import Backbone
from patchsae.latents.atlas import AtlasConfig
from patchsae.runs.intervals import bootstrap

TITLES = {Method.COOP: "CoOp", Method.VPT: "VPT", Change.LORA: "LoRA", Change.FULL: "Fine-tuning"}


class Way(NamedTuple):
    """One way to adapt, on one data set, beside CLIP on the same test images."""

    by_parts: dict[Parts, np.ndarray]
    """Which test images of base classes each mixture with CLIP gets right: 0 or 1, [N]."""
    right: dict[str, np.ndarray]
    """Which test images the adapted model gets right, by half of the classes: 0 or 1, [N]."""
    sizes: dict[str, float]
    """Latents per base class that are high in both models, or off the diagonal."""

    def divided(self, seed: int) -> Divided | None:
        """Divide the gain on base classes among the model's parts; None where there is no clear gain."""
        gain = bootstrap(self.by_parts[MAPLE] - self.by_parts[CLIP], seed)
        return divide(self.by_parts, seed) if gain.low > 0 else None


class Others(NamedTuple):
    """All ways to adapt of which this run has models, on the data sets that have any but MaPLe's."""

    adaptation: Adaptation
    ways: dict[str, dict[str, Way]]
    """By name of the data set and title of the way; MaPLe is the first."""
    untrained: dict[tuple[str, str], np.ndarray]
    """Right or wrong with CLIP and MaPLe's untrained prompt, by data set and half."""

    def task(self, name: str) -> Task:
        """Return a data set under CLIP and MaPLe."""
        return self.adaptation.tasks[name]


def other_ways(a: Adaptation, prompt_seed: int) -> Others:
    """Mix CLIP with models that were adapted in other ways, where they are there."""
    ways, untrained = {}, {}
    for name, t in a.tasks.items():
        models = {title: a.prompts(name, prompt_seed, method) for method, title in TITLES.items()}
        models = {title: model for title, model in models.items() if model}
        if not models:
            continue
        known = Way(
            _by_parts(t.halves["base"].mixed),
            {half: t.right(half, MAPLE).astype(float) for half in t.halves},
            _sizes(t, t.base_counts[1]),
        )
        ways[name] = {"MaPLe": known} | {title: _way(a, t, model) for title, model in models.items()}
        for half, about in t.halves.items():
            text = untrained_text(a, t, about)
            untrained[name, half] = hits(a.run, a.run.backbone, about.test, text)[0]
    return Others(a, ways, untrained)


def _way(a: Adaptation, t: Task, model: Backbone) -> Way:
    run, base, novel = a.run, t.halves["base"], t.halves["novel"]
    model.remember(MEMORY)
    words = {half: model.class_weights(about.part.classnames) for half, about in t.halves.items()}
    texts = t.texts[0][base.keep], words["base"]
    mixed = mix_models(run.sae, run.sae_hash, run.backbone, model, base.test, texts, run.root)
    by_parts = _by_parts(mixed)
    right = {"base": by_parts[MAPLE], "novel": hits(run, model, novel.test, words["novel"])[0]}
    counted_on = t.train.classes(range(len(base.part.classnames)))
    atlas = run.atlas(counted_on, AtlasConfig(tau=a.settings.tau, k=a.settings.k), model)
    return Way(by_parts, right, _sizes(t, class_counts(atlas)))


def _by_parts(mixed: Mixed) -> dict[Parts, np.ndarray]:
    return {parts: (rank == 0).astype(float) for parts, rank in mixed.tokens.items()}


def _sizes(t: Task, counts: np.ndarray) -> dict[str, float]:
    groups = compare_counts(t.base_counts[0], counts)
    return {name: float(members.sum(1).mean()) for name, members in groups._asdict().items()}


def accuracy_of_ways(others: Others) -> Table | None:
    """Return the accuracy of each way and its gain over CLIP, both halves; None without any."""
    rows, seed = {}, others.adaptation.run.seed
    for name, ways in others.ways.items():
        t = others.task(name)
        for half, about in t.halves.items():
            row: dict[str, object] = {
                "chance": fixed(100 * about.chance, 1),
                "CLIP": percent(bootstrap(t.right(half, CLIP), seed)),
                "CLIP, MaPLe's untrained prompt": percent(bootstrap(others.untrained[name, half], seed)),
            }
            for title, way in ways.items():
                row[title] = percent(bootstrap(way.right[half], seed))
            for title, way in ways.items():
                row[f"{title} − CLIP"] = percent(bootstrap(way.right[half] - t.right(half, CLIP), seed))
            rows[t.title, half] = row
    caption = (
        "Accuracy in % of words alone (CoOp), image tokens alone (VPT) and CLIP's own weights (LoRA, "
        "fine-tuning of the image tower)."
    )
    return Table(caption, rows, ("data set", "classes"), folded=True) if rows else None


def parts_of_ways(others: Others) -> Table | None:
    """Return where the gain of each way lies, and how many latents of a class move; None without any."""
    rows, seed = {}, others.adaptation.run.seed
    for name, ways in others.ways.items():
        for title, way in ways.items():
            divided, t = way.divided(seed), others.task(name)
            gains = {half: way.right[half] - t.right(half, CLIP) for half in way.right}
            shares = ("mapping", "words", "stream", "more")
            told = {share: percent(getattr(divided, share), 0) if divided else "–" for share in shares}
            rows[t.title, title] = {
                "gain on base, points": percent(bootstrap(gains["base"], seed)),
                "on novel": percent(bootstrap(gains["novel"], seed)),
                "mapping, % of the gain": told["mapping"],
                "its words alone, %": told["words"],
                "stream, %": told["stream"],
                "mapping − stream": told["more"],
                "high in both": fixed(way.sizes["high"], 1),
                "off the diagonal": fixed(way.sizes["high_to_low"] + way.sizes["low_to_high"], 1),
            }
    caption = (
        "Where the gain of each way lies, and latents per base class that are high in both models or "
        "high in one and low in the other."
    )
    return Table(caption, rows, ("data set", "adapted by")) if rows else None


def lora_finding(others: Others) -> Beyond | None:
    """Judge that LoRA's gain, too, lies in the mapping rather than in what is seen; None without LoRA.

    Of the ways beside MaPLe it alone can change both: fine-tuning leaves the words as they are.
    """
    seed, lora = others.adaptation.run.seed, _pooled(others, Change.LORA)
    if lora is None:
        return None
    gain = bootstrap(lora[MAPLE] - lora[CLIP], seed)
    about = f"LoRA gains {percent(gain)} points on base classes of {len(others.ways)} data sets."
    if gain.low <= 0:
        more, judged = None, Judged(Verdict.OPEN, Reason.FEW, f"There is no clear gain to divide. {about}")
    else:
        divided = divide(lora, seed)
        more = in_percent(divided.more)
        judged = is_above(more, why=f"{about} {_kept(divided)}{_of_tuning(others)}")
    return beyond(
        "Where LoRA adapts both towers, more of its gain lies in the mapping than in what is seen",
        label="other-ways",
        quantity="share of LoRA's gain on base classes, mapping minus stream",
        ours=more,
        unit="points",
        rule="the interval lies above 0",
        **judged._asdict(),
        effect=None if more is None else more.value / 100,
        effect_name="share of the gain, mapping minus stream",
    )


def _pooled(others: Others, method: Change) -> dict[Parts, np.ndarray] | None:
    """Join what mixtures with a method get right on base classes of all data sets; None without it."""
    title = TITLES[method]
    found = [ways[title] for ways in others.ways.values() if title in ways]
    if not found:
        return None
    return {p: np.concatenate([way.by_parts[p] for way in found]) for p in found[0].by_parts}


def _kept(divided: Divided) -> str:
    return (
        f"CLIP's stream with the adapted rest keeps {percent(divided.mapping, 0)} % of that, the adapted "
        f"stream with CLIP's rest {percent(divided.stream, 0)} %."
    )


def _of_tuning(others: Others) -> str:
    """Say where fine-tuning's gain lies, which cannot be in the words."""
    seed, tuned = others.adaptation.run.seed, _pooled(others, Change.FULL)
    if tuned is None or bootstrap(tuned[MAPLE] - tuned[CLIP], seed).low <= 0:
        return ""
    stream = percent(divide(tuned, seed).stream, 0)
    return f" Fine-tuning, which leaves the words as they are, has {stream} % of its gain in the stream."


def against_maple(others: Others) -> list[str]:
    """Say of each way whether it gains more on base classes than MaPLe, on the same images."""
    compared = {
        Verdict.REPRODUCED: "clearly more than MaPLe",
        Verdict.DIFFERS: "clearly less than MaPLe",
        Verdict.OPEN: "neither clearly more nor less than MaPLe",
    }
    seed, lines = others.adaptation.run.seed, []
    for name, ways in others.ways.items():
        maple, told = ways["MaPLe"].right["base"], []
        for title, way in ways.items():
            if title != "MaPLe":
                change = bootstrap(way.right["base"] - maple, seed)
                told.append(f"{title} gains {compared[above(change)]} ({percent(change)} points)")
        lines.append(f"On base classes of {others.task(name).title}, {_listed(told)}.")
    return lines


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
