"""The reproduction report: a page and report.json, made from what the executed notebooks found.

Nothing here is about a result: rows come from `patchsae.report.collect`, costs and versions from the
manifests of the executed notebooks.
"""

from __future__ import annotations

import ast
import html
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchsae import figures
from patchsae.report import ITEMS, Finding, Verdict, collect
from patchsae.run import read_parameters
from patchsae.stage import write_atomic

BADGES = {
    Verdict.REPRODUCED: "success",
    Verdict.DIFFERS: "warning",
    Verdict.PAPER_SCALE: "info",
    Verdict.OPEN: "info",
}
# Figure functions for whatever they are given: they are no figure of their own.
GENERIC = ("image_row", "score_intervals")

SUMMARY = """\
# Reproduction report

Every figure and table of the paper, the number of this run that speaks to it, and whether the
paper's statement holds here. The page was generated when the book was built: each row was displayed
by the cell that made the figure, and the name in the first column leads to that cell. The same rows
are in `report.json`, beside `index.html`.

**{rows} rows at scale {scale}: {told}.**

*Reproduced* means that the paper's **statement** holds in this run by the rule in small print. It
does not mean that the numbers agree: at the embedded scale model, images and dictionary are others
and much smaller. *Differs* means that it does not hold; *not decided*, that the interval holds both
answers or that something is lacking; *needs paper scale*, that the small model cannot tell. Where
the paper prints no number for what is compared, its column is empty.
"""
COSTS = """\
## What it took

Wall time and peak resident memory of each notebook when it was executed, all of its processes together; a
notebook finds what those before it, or an earlier build, left in `results`.
"""


def gather(root: Path, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report: rows, what each notebook cost, and what it ran on.

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
    return {
        "rows": collect(list(executed.values())),
        "notebooks": notebooks,
        "commit": last["commit"],
        "versions": last["versions"],
    }


def write_page(root: Path, report: Mapping[str, Any], path: Path) -> None:
    """Write the report as a page of the book."""
    text = "\n".join([*_summary(report), *_rows(report), *_reasons(report), *_extras(root), *_run(report)])
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _summary(report: Mapping[str, Any]) -> list[str]:
    counted = Counter(row["verdict"] for row in report["rows"])
    told = ", ".join(f"{v} {counted[v]}" for v in Verdict if counted[v])
    scales = sorted({book["scale"] for book in report["notebooks"] if book["scale"]})
    scale = " and ".join(f"`{name}`" for name in scales)
    return [SUMMARY.format(rows=len(report["rows"]), scale=scale, told=told)]


def _rows(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Every figure and table",
        "",
        "```{rst-class} rows",
        "```",
        "| | the paper shows | number compared | paper | this run [95 %] | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        found = _finding(row)
        cells = [
            _link(row),
            f"{found.claim}<br><small>Holds if {html.escape(found.rule)}.</small>",
            found.quantity,
            "" if found.paper is None else found.number(found.paper),
            found.measured(),
            f"{{bdg-{BADGES[Verdict(found.verdict)]}}}`{found.verdict}`",
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return [*lines, ""]


def _reasons(report: Mapping[str, Any]) -> list[str]:
    lines = ["## What differs and why, and what else to know", ""]
    for row in report["rows"]:
        if row["why"]:
            lines.append(f"* {_link(row)}, {ITEMS[row['id']][0].lower()}{ITEMS[row['id']][1:]} "
                         f"(**{row['verdict']}**): {row['why']}")  # fmt: skip
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
    return Finding(**{key: value for key, value in row.items() if key != "cell"}, label="")


def _link(row: Mapping[str, Any]) -> str:
    return f"{{ref}}`{row['id']} <{row['cell'].split('#')[1]}>`"
