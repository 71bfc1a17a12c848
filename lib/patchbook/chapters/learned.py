"""Has an SAE learned: the goals of the book's SAEs, and a table of what is reached.

    python -m patchbook.chapters.learned --sae FOLDER [--other FOLDER ...] --images 1500 --split train

prints the table for a saved SAE; split 'train' measures on scenes made for choosing recipes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from patchbook.chapters.against_untrained import Lead, Learned, Purity, measure
from patchbook.chapters.probes import open_probes
from patchbook.scales import scale
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval
from patchsae.sae.model import SAE


class Goal(NamedTuple):
    """One line of the table."""

    what: str
    of: Callable[[Learned], Interval | float | None]
    goal: str = ""  # nothing is asked of a line without
    reached: Callable[[Learned], bool] | None = None


def _at_least(what: str, of: Callable[[Learned], Interval | None], least: float) -> Goal:
    return Goal(what, of, f"≥ {least:g}".replace("0.", "."), lambda m: of(m).value >= least)


def _above_zero(what: str, of: Callable[[Learned], Interval | None]) -> Goal:
    return Goal(what, of, "above 0", lambda m: of(m).low > 0)


def _of_purity(name: str, of: Callable[[Learned], Purity]) -> tuple[Goal, ...]:
    return (
        _at_least(f"purity of ten references ({name})", lambda m: of(m).mean, 0.5),
        Goal(f"purity ({name}): null", lambda m: of(m).null),
        Goal(f"purity ({name}): untrained", lambda m: of(m).untrained),
        _above_zero(f"purity ({name}): − untrained", lambda m: of(m).ahead),
        _at_least(f"purity ({name}): latents above .5", lambda m: of(m).half, 0.4),
        Goal(f"purity ({name}): … − untrained", lambda m: of(m).half_ahead),
    )


def _of_lead(name: str, of: Callable[[Learned], Lead]) -> tuple[Goal, ...]:
    return (
        Goal(name, lambda m: of(m).best),
        Goal(f"{name}: untrained", lambda m: of(m).untrained),
        Goal(f"{name}: supervised ceiling", lambda m: of(m).ceiling),
        _above_zero(f"{name}: − untrained", lambda m: of(m).ahead),
    )


SEVERAL = "pointing, two or more objects"
GOALS = (
    Goal("cosine with own start", lambda m: m.decoder, "≤ .5", lambda m: m.decoder.value <= 0.5),
    Goal("encoder: the same", lambda m: m.encoder),
    _at_least("seeds matched", lambda m: m.matched, 0.7),
    Goal("seeds matched: chance", lambda m: m.chance, "below it", lambda m: m.chance.high < m.matched.low),
    Goal("seeds matched: living latents", lambda m: m.matched_living),
    Goal("living latents", lambda m: m.living),
    Goal("L0", lambda m: m.l0),
    Goal("L0: untrained", lambda m: m.untrained_l0),
    Goal("FVU", lambda m: m.fvu),
    Goal("FVU of PCA at this L0", lambda m: m.pca),
    Goal("FVU − PCA", lambda m: m.fvu_over_pca, "below 0", lambda m: m.fvu_over_pca.high < 0),
    *_of_purity("label", lambda m: m.purity),
    *_of_purity("any object", lambda m: m.any_purity),
    *_of_lead("pointing", lambda m: m.pointing),
    *_of_lead(SEVERAL, lambda m: m.pointing_several),
    _at_least(f"{SEVERAL}: way to the ceiling", lambda m: m.pointing_several.way, 0.5),
    *_of_lead("AP", lambda m: m.precision),
    _at_least("accuracy kept through the SAE", lambda m: m.kept, 0.95),
)

# what figures show: each has to be above 0
DIFFERENCES: dict[str, Callable[[Learned], Interval]] = {
    "purity (label)": lambda m: m.purity.ahead,
    "purity (any object)": lambda m: m.any_purity.ahead,
    "latents purer than .5 (any object)": lambda m: m.any_purity.half_ahead,
    "pointing": lambda m: m.pointing.ahead,
    SEVERAL: lambda m: m.pointing_several.ahead,
    "AP": lambda m: m.precision.ahead,
}


def table(measured: Mapping[str, Learned]) -> list[dict[str, str]]:
    """Return the lines of GOALS, a column for each SAE and, where something is asked, who reaches it."""
    rows = []
    for goal in GOALS:
        known = {name: m for name, m in measured.items() if goal.of(m) is not None}
        kept = [name for name, m in known.items() if goal.reached and goal.reached(m)]
        verdict = "yes" if len(kept) == len(known) else ", ".join(kept) or "no"
        cells = {name: written(goal.of(m)) for name, m in measured.items()}
        rows.append(
            {"what": goal.what, "goal": goal.goal, **cells}
            | {"reached": verdict if goal.reached and known else ""}
        )
    return rows


def written(found: Interval | float | None) -> str:
    """Write a number to three digits, with its interval if it has one."""
    if found is None:
        return ""
    value, *ends = found if isinstance(found, Interval) else (found,)
    # adding 0 takes the minus from a zero
    value, *ends = (f"{float(f'{part:.3g}') + 0.0:.3g}".replace("-", "−") for part in (value, *ends))
    return value + (f" [{ends[0]}, {ends[1]}]" if ends else "")


def sentence(measured: Mapping[str, Learned]) -> str:
    """Say how many goals every SAE reaches, and list those that only some or none reach."""
    rows = [row for row in table(measured) if row["reached"]]
    missed = [row for row in rows if row["reached"] != "yes"]
    lines = [f"**{len(rows) - len(missed)} of {len(rows)} goals are reached by every autoencoder** below."]
    for row in missed:
        values = " and ".join(row[name].split(" [")[0] for name in measured if row[name])
        who = "" if row["reached"] == "no" else f", reached by {row['reached']} alone"
        lines.append(f"* Not reached: {row['what']}, {values} (goal {row['goal']}{who}).")
    return "\n\n".join(lines[:1] + ["\n".join(lines[1:])] * bool(missed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a saved SAE at the embedded scale, print its table, and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        sae, *others = (SAE.load(folder, options.device) for folder in (options.sae, *options.other))
        start = SAE.load(options.start, options.device) if options.start else SAE(sae.config, options.seed)
        backbone = scale("embedded").backbone(block=options.block, device=options.device)
        probes = open_probes(backbone, options.images, options.references, options.split)
        found = measure({options.sae: sae}, backbone, probes, {options.sae: start}, others)
    except PatchSAEError as error:
        print(error, file=sys.stderr)
        return 2
    rows = table(found)
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print(" | ".join(row.values()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m patchbook.chapters.learned",
        description="Measure a saved SAE of the embedded scale against an untrained one of the same L0.",
        epilog="Exit code: 0 done; 2 bad input.",
    )
    add = parser.add_argument
    add("--sae", required=True, help="folder written by SAE.save")
    add("--other", nargs="*", default=[], help="folders of the same recipe from other seeds")
    add("--seed", type=int, default=0, help="seed that the SAE was started from (default 0)")
    add("--start", help="folder of the SAE as it started, where rows began as data")
    add("--images", type=int, default=1500, help="scored scenes, with masks as many (default 1500)")
    add("--references", type=int, default=8000, help="training scenes of references (default 8000)")
    add("--split", default="test", help="'test' (default) or 'train', to choose recipes by")
    add("--block", type=int, default=11, help="block whose output is decomposed (default 11)")
    add("--device", default="cpu", help="'cpu' (default) or 'cuda'")
    return parser


if __name__ == "__main__":
    sys.exit(main())
