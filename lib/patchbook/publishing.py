"""Executed notebooks as a book shows them: figures with words and files beside them.

A figure's output holds its forms (`patchbook.figures.showing`). Here they become files of the book and one
piece of HTML that names them, so that a page opened from disk shows the picture and leads to the rest.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from patchbook.collecting import FIGURE, targets
from patchsae.runs.stage import write_atomic

FORMS = {"png": "image/png", "pdf": "application/pdf", "csv": "text/csv"}
"""Ending of each file of a figure and the form that it is."""
STATIC = "_static/figures"
SOURCES = "_static/notebooks"


def publish(notebook: nbformat.NotebookNode, source: Path, book: Path) -> list[dict[str, Any]]:
    """Put an executed notebook into the book's folder of notebooks, its figures as files and HTML.

    `notebook` is changed; `source` is the file that it was executed from, offered beside each figure.

    A file that is there already and the same is left as it is. Returns what the figures are, in order, each
    with the address of its picture below the book's `_static` (`png`).
    """
    folder, drawn, here = book / STATIC / source.stem, [], [""]
    counted: dict[str, int] = {}
    kept = set()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            here = targets(cell.source) or here
            continue
        own = _of_cell(cell)
        for output in cell.get("outputs", ()):
            _name_corner(output)
            about = output.get("metadata", {}).get(FIGURE)
            if about is None:
                continue
            target = here[-1]
            near = target or "figure"
            counted[near] = counted.get(near, 0) + 1
            name = f"{near}-{counted[near]}" if counted[near] > 1 else near
            data = output["data"]
            for ending, form in FORMS.items():
                content = data.pop(form)
                content = base64.b64decode(content) if ending != "csv" else content.encode()
                _write(folder / f"{name}.{ending}", content)
                kept.add(f"{name}.{ending}")
            said = dict(about) | own
            items = [item for item in about["items"] if any(_labels(one, item) for one in here)]
            shown = said | {"items": items, "file": name, "target": target, "notebook": source.stem}
            data["text/html"] = figure_html(shown)
            data.pop("text/plain", None)
            drawn.append(shown | {"png": f"{STATIC}/{source.stem}/{name}.png"})
    for stale in folder.glob("*"):
        if stale.name not in kept:
            stale.unlink()
    _write(book / SOURCES / source.name, source.read_bytes())
    text = nbformat.writes(notebook, version=4)
    _write(book / "notebooks" / source.name, text.encode())
    return drawn


def figure_html(shown: Mapping[str, Any]) -> str:
    """Write a figure as a page holds it; addresses are those of a page in `notebooks`."""
    base = f"../../{STATIC}/{shown['notebook']}/{shown['file']}"
    wide, high = (round(96 * side) for side in shown["inches"])
    items = ", ".join(shown["items"])
    links = [
        (f"{base}.png", "full size", ""),
        (f"{base}.pdf", "PDF", " download"),
        (f"{base}.csv", "numbers (CSV)", " download"),
        (f"#{shown['target'] or 'figure-' + shown['file']}", "code", ' class="to-code"'),
        (f"../../{SOURCES}/{shown['notebook']}.ipynb", "notebook", " download"),
    ]
    # a link says of which figure it is, to those who hear links alone
    about = html.escape(f"{shown['file']} of {shown['notebook']}", quote=True)
    listed = " · ".join(
        f'<a href="{address}"{more} aria-label="{text}, {about}">{text}</a>'
        for address, text, more in links
    )
    alt = html.escape(shown["alt"], quote=True)
    after = f"After the paper's {items}. " if items else ""
    return (
        f'<figure class="drawn" id="figure-{shown["file"]}" style="--inches: {shown["inches"][0]}" '
        f'data-smallest="{shown["smallest"]}"><a class="picture" href="{base}.png">'
        f'<img src="{base}.png" width="{wide}" height="{high}" loading="lazy" alt="{alt}"></a>'
        f"<figcaption>{html.escape(shown['caption'])} {after}"
        f'<span class="forms">{listed}</span></figcaption></figure>'
    )


def _labels(target: str, item: str) -> bool:
    """Tell whether a label, as `fig-5b`, is of the paper's item, as Fig. 5: one function draws several."""
    return re.match(re.escape(item.lower().replace(". ", "-")) + r"(?!\d)", target) is not None


def _name_corner(output: nbformat.NotebookNode) -> None:
    """Make the empty heads of a table of pandas plain cells: a head without a name is read out as one."""
    table = output.get("data", {}).get("text/html", "")
    if 'class="dataframe"' in table:
        output["data"]["text/html"] = re.sub(r"<th([^>]*)>\s*</th>", r"<td\1></td>", table)


def _of_cell(cell: nbformat.NotebookNode) -> dict[str, str]:
    """Take what a cell says of its own figures (myst-nb's cell metadata), which no other place may show."""
    given = cell.get("metadata", {}).get("mystnb", {})
    said = {}
    if "caption" in given.get("figure", {}):
        said["caption"] = given.pop("figure")["caption"]
    if "alt" in given.get("image", {}):
        said["alt"] = given.pop("image")["alt"]
    return said


def _write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, lambda temporary: temporary.write_bytes(content))
