"""The reproduction report: a page and report.json, made from what the executed notebooks found.

Nothing here is about a result: rows come from `patchbook.collecting.collect`, costs and versions from the
manifests of the executed notebooks.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchbook import figures
from patchbook.collecting import collect, collect_beyond, count_verdicts
from patchbook.parameters import read_parameters
from patchbook.report import (
    ITEMS,
    Answer,
    Beyond,
    Finding,
    Verdict,
)
from patchsae.runs.stage import write_atomic

BADGES = {
    Verdict.REPRODUCED: "success",
    Verdict.DIFFERS: "warning",
    Verdict.PAPER_SCALE: "info",
    Verdict.OPEN: "info",
    Answer.HOLDS: "success",
    Answer.FAILS: "warning",
}
# Figure functions for whatever they are given: they are no figure of their own.
GENERIC = ("image_row", "score_intervals")

SUMMARY = """\
# Reproduction report

Every figure and table of the paper, the number of this run that speaks to it, and whether the
paper's statement holds here. The page was generated when the book was built: each row was displayed
by the cell that made the figure, and the name in the first column leads to that cell. The same rows
are in `report.json`, beside `index.html`.

**{rows} rows at scale {scale}. Of the {counted} that a run can refute: {told}.** {given}

*Reproduced* means that the paper's **statement** holds in this run by the rule in small print. It
does not mean that the numbers agree: at the embedded scale model, images and dictionary are others
and much smaller. *Differs* means that it does not hold; *not decided*, that the interval holds both
answers or that something is lacking; *needs paper scale*, that the small model cannot tell. The word
in brackets says why. The *effect* says what a result weighs: a verdict can be clear and the effect
small. Where the paper prints no number for what is compared, its column is empty.
"""
BEYOND_HEAD = """\
## Beyond the paper

What this book asks and the paper does not. These rows are not counted above.
"""
COSTS = """\
## What it took

Wall time and peak resident memory of each notebook when it was executed, all of its processes together; a
notebook finds what those before it, or an earlier build, left in `results`.
"""


def gather(root: Path, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report: rows of the paper and beyond it, counts, what each notebook cost and ran on.

    The counts of verdicts leave out rows that cannot fail.

    `manifests` of the executed notebooks by name, in the order of the book.
    """
    executed = {name: root / "book" / "notebooks" / f"{name}.ipynb" for name in manifests}
    notebooks = []
    for name, manifest in manifests.items():
        given = manifest["inputs"]["parameters"]
        declared = read_parameters(root / "notebooks" / f"{name}.ipynb")
        values = {key: ast.literal_eval(parameter.source) for key, parameter in declared.items()} | given
        facts = manifest.get("facts", {})
        notebooks.append(
            {
                "notebook": f"{name}.ipynb",
                "seconds": facts.get("seconds"),
                "peak_mb": facts.get("peak_mb"),
                "scale": values.get("scale"),
                "seeds": {key: values[key] for key in values if "seed" in key and "image" not in key},
                "parameters": given,
                "started": manifest["started"],
                "commit": manifest["commit"],
                "machine": facts.get("machine"),
            }
        )
    last = list(manifests.values())[-1]
    rows = collect(list(executed.values()))
    return {
        "rows": rows,
        "counts": count_verdicts(rows),
        "beyond": collect_beyond(list(executed.values())),
        "notebooks": notebooks,
        "commit": last["commit"],
        "versions": last["versions"],
    }


def write_page(root: Path, report: Mapping[str, Any], path: Path) -> None:
    """Write the report as a page of the book."""
    parts = _summary(report), _rows(report), _beyond_rows(report), _reasons(report), _extras(root)
    text = "\n".join([line for part in (*parts, _run(report)) for line in part])
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_digest(report: Mapping[str, Any], path: Path) -> None:
    """Write what the introduction says of a run: the counts, and what is beyond the paper."""
    counts = report["counts"]
    told = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
    lines = [
        f"In this run, at scale {_scale(report)}, of the {sum(counts.values())} figures and tables of the "
        f"paper that a run can refute: **{told}** ([all of them](report.md)).",
        "",
    ]
    if report["beyond"]:
        lines += ["Beyond the paper:", ""]
    for row in report["beyond"]:
        found = _beyond(row)
        why = f" {found.why}" if found.why else ""
        lines.append(f"* **{found.id}** ({_link(row, 'shown here')}): {found.verdict}.{why}")
    text = "\n".join([*lines, ""])
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _scale(report: Mapping[str, Any]) -> str:
    return " and ".join(sorted({f"`{book['scale']}`" for book in report["notebooks"] if book["scale"]}))


def _summary(report: Mapping[str, Any]) -> list[str]:
    counts = report["counts"]
    told = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
    given = [_link(row) for row in report["rows"] if not row["can_fail"]]
    said = f"Not counted, because true by construction: {', '.join(given)}." if given else ""
    return [
        SUMMARY.format(
            rows=len(report["rows"]),
            scale=_scale(report),
            counted=sum(counts.values()),
            told=told,
            given=said,
        )
    ]


def _rows(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Every figure and table",
        "",
        "```{rst-class} rows",
        "```",
        "| | verdict | this run [95 %] | effect | number compared | paper | the paper shows |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        found = _finding(row)
        cells = [
            _link(row),
            _badge(found.verdict, found.can_fail),
            found.measured(),
            html.escape(found.weighed()),
            found.quantity,
            "" if found.paper is None else found.number(found.paper),
            f"{found.claim}<br><small>Holds if {html.escape(found.rule)}.</small>",
        ]
        lines.append(_table_line(cells))
    return [*lines, ""]


def _beyond_rows(report: Mapping[str, Any]) -> list[str]:
    """List what the paper does not ask; nothing where no notebook says any."""
    if not report["beyond"]:
        return []
    lines = [
        BEYOND_HEAD,
        "```{rst-class} rows beyond",
        "```",
        "| | verdict | this run [95 %] | effect | number compared | what else to know |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["beyond"]:
        found = _beyond(row)
        because = f" ({found.reason})" if found.reason else ""
        cells = [
            _link(row),
            _badge(found.verdict),
            found.measured(),
            html.escape(found.weighed()),
            f"{found.quantity}<br><small>Holds if {html.escape(found.rule)}.</small>",
            html.escape(f"{found.why}{because}".strip()),
        ]
        lines.append(_table_line(cells))
    return [*lines, ""]


def _badge(verdict: Verdict | Answer, can_fail: bool = True) -> str:
    """Return a verdict as a badge; what cannot fail has one of its own."""
    if not can_fail and verdict == Verdict.REPRODUCED:
        return "{bdg-dark}`by construction`"
    return f"{{bdg-{BADGES[verdict]}}}`{verdict}`"


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _reasons(report: Mapping[str, Any]) -> list[str]:
    lines = ["## What differs and why, and what else to know", ""]
    for row in report["rows"]:
        if row["why"]:
            because = f", {row['reason']}" if row["reason"] and row["reason"] != row["verdict"] else ""
            about = ITEMS[row["id"]]
            lines.append(f"* {_link(row)}, {about[0].lower()}{about[1:]} "
                         f"(**{row['verdict']}**{because}): {row['why']}")  # fmt: skip
    return [*lines, ""]


def _extras(root: Path) -> list[str]:
    """List the figures that the paper does not have, and the chapters that show them."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (root / "notebooks").glob("*.ipynb")}
    lines = ["## Figures that the paper does not have", ""]
    for name in figures.__all__:
        if getattr(getattr(figures, name), "figure_of", None) != () or name in GENERIC:
            continue
        where = [
            f"[{n}](notebooks/{n}.ipynb)" for n, s in sorted(sources.items()) if f"figures.{name}(" in s
        ]
        if where:
            lines.append(f"* {_caption(getattr(figures, name).__doc__)} ({', '.join(where)})")
    return [*lines, ""]


def _caption(docstring: str) -> str:
    """Turn "Show which share … [n, n] …." into a caption: without the verb, shapes and the full stop."""
    line = re.sub(r" \[[^]]*\]", "", docstring.splitlines()[0].rstrip("."))
    line = re.sub(r"^(Show|Draw|Plot) ", "", line)
    return line[0].upper() + line[1:]


def _run(report: Mapping[str, Any]) -> list[str]:
    lines = [
        COSTS,
        "| notebook | wall time | peak memory | seeds | executed | commit |",
        "|---|---|---|---|---|---|",
    ]
    for book in report["notebooks"]:
        seeds = ", ".join(f"{name} {value}" for name, value in book["seeds"].items())
        memory = f"{book['peak_mb']:,.0f} MB"
        lines.append(
            f"| [{book['notebook']}](notebooks/{book['notebook']}) | {book['seconds']:.0f} s | {memory} "
            f"| {seeds} | {book['started']} | `{_short(book['commit'])}` |"
        )
    machines = sorted({book["machine"] for book in report["notebooks"] if book["machine"]})
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [*lines, "", f"Machine: {'; '.join(machines)}.", "", f"Versions: {versions}.", ""]


def _short(commit: str | None) -> str:
    """Shorten a commit's number, and keep what says that files were changed."""
    number, dash, changed = (commit or "no commit").partition("-")
    return number[:12] + dash + changed


def _finding(row: Mapping[str, Any]) -> Finding:
    """Make the finding of a row of `collect` again."""
    return Finding(**{key: value for key, value in row.items() if key != "cell"}, label="")


def _beyond(row: Mapping[str, Any]) -> Beyond:
    """Make the row of `collect_beyond` again."""
    return Beyond(**{key: value for key, value in row.items() if key != "cell"}, label="")


def _link(row: Mapping[str, Any], shown: str = "") -> str:
    return f"{{ref}}`{shown or row['id']} <{row['cell'].split('#')[1]}>`"
