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
from patchbook.collecting import collect, collect_beyond, collect_lessons, count_verdicts
from patchbook.parameters import read_parameters
from patchbook.report import ITEMS, Beyond, Finding, Verdict
from patchsae.runs.stage import write_atomic

CLAIMS = (
    ("Some latents carry a class", "Fig. 5", (), True),
    ("Adaptation changes little in what is seen", "Fig. 17", ("Fig. 20",), False),
    ("Adaptation changes what the seen concepts mean", "Fig. 6", ("Fig. 22",), False),
)
"""The paper's claims, the row that each is judged by, rows that ask the same on other data, and whether the
claim is about the row's effect rather than about the number that the paper prints."""
PAPER = (
    ("the paper", "https://arxiv.org/abs/2412.05276"),
    ("the authors' code", "https://github.com/dynamical-inference/patchsae"),
)
# Figure functions for whatever they are given: they are no figure of their own.
GENERIC = ("image_row", "score_intervals")

SUMMARY = """\
# Reproduction report

Every figure and table of the paper, the number of this run that speaks to it, and whether the
paper's statement holds here. The page was generated when the book was built: each row was displayed
by the cell that made the figure, and its name leads to that cell.

**{rows} rows at scale {scale}. Of the {counted} that a run can refute: {told}.** {given}
<a href="../report.json">report.json</a> holds all rows for programs.

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


def gather(
    root: Path, manifests: Mapping[str, Mapping[str, Any]], drawn: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the report: rows of the paper and beyond it, counts, what each notebook cost and ran on.

    The counts of verdicts leave out rows that cannot fail.

    `manifests` of the executed notebooks by name, in the order of the book; `drawn`, their figures
    (`patchbook.publishing.publish`).
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
        "lessons": collect_lessons(list(executed.values())),
        "figures": list(drawn),
        "notebooks": notebooks,
        "commit": last["commit"],
        "versions": last["versions"],
    }


def write_page(root: Path, report: Mapping[str, Any], path: Path) -> None:
    """Write the report as a page of the book."""
    parts = (
        _summary(report), ["## The paper's three claims", "", *_claims(report), ""], _rows(report),
        _undecided(report), _reasons(report), _beyond_rows(report), _index(report), _extras(root),
        _run(report),
    )  # fmt: skip
    text = "\n".join([line for part in parts for line in part])
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_digest(report: Mapping[str, Any], path: Path) -> None:
    """Write what the first page says of a run: claims, a picture, counts, a result of each chapter."""
    counts = report["counts"]
    told = ", ".join(f"{name} {n}" for name, n in counts.items() if n)
    outside = " · ".join(f'<a href="{address}">{html.escape(name)}</a>' for name, address in PAPER)
    lines = [
        '<div class="found">', *_claims(report), f"<p>{outside}</p>", *_picture(report), "</div>", "",
        f"In this run, at scale {_scale(report)}, of the {sum(counts.values())} figures and tables of the "
        f"paper that a run can refute: **{told}** ([row by row](report.md)).",
        "",
        "The main result of each chapter:", "", *_main_results(report), "",
    ]  # fmt: skip
    if report["beyond"]:
        lines += ["Beyond the paper:", ""]
    for row in report["beyond"]:
        found = _beyond(row)
        why = f" {found.why}" if found.why else ""
        lines.append(f"* **{found.id}** ({_link(row, 'shown here')}): {found.verdict}.{why}")
    text = "\n".join([*lines, ""])
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _claims(report: Mapping[str, Any]) -> list[str]:
    """Set the paper's claims beside what this run found, as HTML without an empty line."""
    rows = {row["id"]: row for row in report["rows"]}
    lines = [
        '<div class="table-box"><table class="rows claims"><thead><tr>',
        "".join(f'<th scope="col">{name}</th>' for name in
                ("What the paper claims", "this run", "the paper's number", "this run's number [95 %]")),
        "</tr></thead><tbody>",
    ]  # fmt: skip
    for claim, item, others, by_effect in CLAIMS:
        row = rows[item]
        found = _finding(row)
        also = "".join(f"<br><small>{_anchor(rows[other])}: {_badge(_finding(rows[other]))}</small>"
                       for other in others)  # fmt: skip
        why = f"<br><small>{html.escape(found.why)}</small>" if found.why else ""
        weighed = f"<br><small>Effect: {html.escape(found.weighed())}</small>" if found.weighed() else ""
        printed = "none printed" if found.paper is None else _with_interval(found.number(found.paper))
        about = f"<small>{html.escape(found.quantity)}</small>"
        ours = f"{_with_interval(found.measured())}<br>{about}{weighed}{why}"
        if by_effect:
            ours = (
                f"{html.escape(found.weighed())}<br><small>{html.escape(found.quantity)}: "
                f"{_with_interval(found.measured())}; in the paper {printed}</small>{why}"
            )
            printed = "none printed"
        cells = (
            ("this run", f"{_badge(found)}<br><small>by {_anchor(row)}</small>{also}"),
            ("the paper's number", printed),
            ("this run's number", ours),
        )
        lines.append(f'<tr><th scope="row">{claim}</th>{_cells(cells)}</tr>')
    return [*lines, "</tbody></table></div>"]


def _cells(cells: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<td data-name="{html.escape(name)}">{text}</td>' for name, text in cells)


def _picture(report: Mapping[str, Any]) -> list[str]:
    """Show the overview of the method, where a notebook has drawn it."""
    for figure in report["figures"]:
        if "Fig. 1" in figure["items"]:
            wide, high = (round(96 * side) for side in figure["inches"])
            page = f"notebooks/{figure['notebook']}.html#{figure['target']}"
            return [
                f'<figure class="drawn" style="--inches: {figure["inches"][0]}"><a class="picture" '
                f'href="{page}"><img src="../{figure["png"]}" width="{wide}" height="{high}" '
                f'alt="{html.escape(figure["alt"], quote=True)}"></a>'
                f"<figcaption>{html.escape(figure['caption'])}</figcaption></figure>"
            ]
    return []


def _main_results(report: Mapping[str, Any]) -> list[str]:
    """List a sentence of each chapter: what it says it has learned, or else its first row."""
    said = {one["cell"].split("#")[0]: one for one in report["lessons"]}
    lines = []
    for book in report["notebooks"]:
        name = book["notebook"]
        rows = [row for row in report["rows"] if row["cell"].split("#")[0] == name]
        rows.sort(key=lambda row: not row["can_fail"])
        if name in said:
            lines.append(f"* [](notebooks/{name}): {said[name]['text']} {_link(said[name], 'Shown here')}.")
        elif rows:
            found = _finding(rows[0])
            lines.append(
                f"* [](notebooks/{name}): {found.claim} **{found.verdict}**: {found.quantity}, "
                f"{found.measured()} ({_link(rows[0])})."
            )
    return lines


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
    """Show the paper's rows, with buttons that keep those of one verdict."""
    counted = {verdict: sum(_kind(_finding(row)) == verdict for row in report["rows"]) for verdict in
               dict.fromkeys(_kind(_finding(row)) for row in report["rows"])}  # fmt: skip
    buttons = [("", "all", len(report["rows"])), *((name, name, n) for name, n in counted.items())]
    lines = [
        "## Every figure and table",
        "",
        '<div class="filter" role="group" aria-label="Show rows of one verdict">',
        *(
            f'<button type="button" data-verdict="{html.escape(kind)}" '
            f'aria-pressed="{str(not kind).lower()}">{html.escape(name)} ({n})</button>'
            for kind, name, n in buttons
        ),
        '<span role="status" class="visually-hidden"></span></div>',
        *_table(report["rows"], "paper"),
        "",
    ]
    return lines


def _beyond_rows(report: Mapping[str, Any]) -> list[str]:
    """List what the paper does not ask; nothing where no notebook says any."""
    return [BEYOND_HEAD, *_table(report["beyond"], "beyond"), ""] if report["beyond"] else []


def _table(rows: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """Write rows as a table in HTML: what, verdict, number, effect, and what it is about."""
    paper = kind == "paper"
    heads = ["figure or table" if paper else "statement", "verdict", "this run [95 %]", "effect"]
    heads += ["paper"] if paper else []
    heads += [
        "the paper shows, and what is compared" if paper else "what is compared, and what else to know"
    ]
    lines = [
        f'<div class="table-box"><table class="rows" data-of="{kind}"><thead><tr>',
        "".join(f'<th scope="col">{head}</th>' for head in heads),
        "</tr></thead><tbody>",
    ]
    for row in rows:
        found = _finding(row) if paper else _beyond(row)
        because = f"<br><small>{html.escape(found.reason)}</small>" if found.reason else ""
        rule = (
            f"<small>Compared: {html.escape(found.quantity)}. Holds if {html.escape(found.rule)}.</small>"
        )
        said = html.escape(found.claim if paper else found.why)
        cells = [
            ("verdict", f"{_badge(found)}{because}"),
            ("this run", _with_interval(found.measured())),
            ("effect", html.escape(found.weighed())),
        ]
        if paper:
            cells.append(("paper", "" if found.paper is None else html.escape(found.number(found.paper))))
        cells.append(("about", f"{said}<br>{rule}" if said else rule))
        lines.append(
            f'<tr data-verdict="{html.escape(_kind(found))}"><th scope="row">{_anchor(row)}</th>'
            f"{_cells(cells)}</tr>"
        )
    return [*lines, "</tbody></table></div>"]


def _kind(found: Finding | Beyond) -> str:
    """Return a row's verdict, or that it could not be another."""
    return str(found.verdict) if getattr(found, "can_fail", True) else "by construction"


def _badge(found: Finding | Beyond) -> str:
    """Return a verdict as a badge; what cannot fail has one of its own."""
    kind = _kind(found)
    return f'<span class="verdict verdict-{kind.replace(" ", "-")}">{html.escape(kind)}</span>'


def _with_interval(measured: str) -> str:
    """Set the interval of a number small."""
    return re.sub(r"(\[[^]]*\])", r'<span class="interval">\1</span>', html.escape(measured))


def _anchor(row: Mapping[str, Any]) -> str:
    """Return a row's name as a link in HTML to the cell that made it."""
    name, label = row["cell"].split("#")
    address = f"notebooks/{name.removesuffix('.ipynb')}.html#{label}"
    return f'<a href="{html.escape(address, quote=True)}">{html.escape(row["id"])}</a>'


def _undecided(report: Mapping[str, Any]) -> list[str]:
    """List the rows that are not decided by what would decide them."""
    open_rows: dict[str, list[str]] = {}
    for row in report["rows"]:
        if row["verdict"] in (Verdict.OPEN, Verdict.PAPER_SCALE):
            open_rows.setdefault(row["reason"], []).append(_link(row))
    if not open_rows:
        return []
    lines = [f"* **{reason}**: {', '.join(rows)}" for reason, rows in open_rows.items()]
    return ["## Not decided, or for the paper's scale, by reason", "", *lines, ""]


def _index(report: Mapping[str, Any]) -> list[str]:
    """Lead from the paper's figure numbers to sections and pictures of this book."""
    lines = ["## Index of the paper's figures", "", "| in the paper | about | in this book | pictures |",
             "|---|---|---|---|"]  # fmt: skip
    for row in report["rows"]:
        name = row["cell"].split("#")[0]
        drawn = [
            f'<a href="../{figure["png"]}" aria-label="{row["id"]}, picture {n}">{n}</a>'
            for n, figure in enumerate((f for f in report["figures"] if row["id"] in f["items"]), 1)
        ]
        lines.append(
            f"| {_link(row)} | {ITEMS[row['id']]} | [chapter {int(name[:2])}](notebooks/{name}) "
            f"| {' '.join(drawn) or '–'} |"
        )
    return [*lines, ""]


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
