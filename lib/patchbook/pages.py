"""What the book's pages ask of Sphinx beyond Markdown: an extension that `_config.yml` names.

* `.. room:: images` gives a room's part of the reference: every module and public name, from its docstring.
* `.. short-names::` gives the names of `import patchsae`.
* `{rooms-picture}` draws the rooms and what flows between them.
* `{tuning}` shows the search of the book's recipe, read from `artefacts/sae/search.csv`.
* `{format-versions}` lists the version of each kind of result, read from the code.
* Each chapter's page gets a line with its notebook, which works from disk.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

import patchsae

if TYPE_CHECKING:
    from patchbook.chapters.tuning import Search

CHAPTERS = "book/notebooks/"
KERNELS = "_kernels"  # compiled functions, called by the module beside them alone
ALIAS = "Alias for field number"  # what Python says of a NamedTuple's field that says nothing itself
VERSION = re.compile(r"^(VERSION|FORMAT) = (\d+)(?:\s+# (.*))?$", re.MULTILINE)
TAKE = (
    "The notebook of this chapter: {{download}}`{name}.ipynb </notebooks/{name}.ipynb>`, without outputs. "
    "To change it and run it, open it in JupyterLab, in a clone: "
    "`.venv/bin/jupyter lab notebooks/{name}.ipynb`."
)
PICTURE = (
    "The rooms of the library in the order in which data flows: images, clip, sae, latents; below them "
    "adaptation, training, masking and explorer; runs under all of them."
)


def modules(room: str) -> list[str]:
    """Return the modules of a room that others import from, by their full names."""
    folder = Path(patchsae.__file__).parent / room
    names = [path.stem for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    return [f"patchsae.{room}.{name}" for name in names if not name.endswith(KERNELS)]


class Room(SphinxDirective):
    """List everything public of a room."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return one section per module."""
        room = self.arguments[0]
        lines = [*(importlib.import_module(f"patchsae.{room}").__doc__ or "").splitlines(), ""]
        for module in modules(room):
            title = module.rpartition(".")[2]
            lines += [title, "-" * len(title), "", f".. automodule:: {module}", "   :members:", ""]
            self.env.note_dependency(importlib.util.find_spec(module).origin)
        return _parsed(self, lines)


class ShortNames(SphinxDirective):
    """List the names of `import patchsae`, each with the first sentence about it."""

    def run(self) -> list[nodes.Node]:
        """Return a list of links."""
        lines = []
        for name, place in patchsae._PUBLIC.items():
            module, _, what = place.partition(":")
            found = getattr(patchsae, name)
            kind = "class" if isinstance(found, type) else "func"
            first = (found.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ")
            lines += [f"``ps.{name}`` : :py:{kind}:`{module}.{what}`", f"   {first}", ""]
        return _parsed(self, lines)


class RoomsPicture(SphinxDirective):
    """Draw the rooms into the page itself: no file that could be missing."""

    def run(self) -> list[nodes.Node]:
        """Return the picture."""
        import matplotlib

        from patchbook.figures import architecture

        held = io.StringIO()
        # letters as letters: they can be searched, and the page is small
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rooms"}):
            architecture.rooms().savefig(held, format="svg", metadata={"Date": None})
        svg = held.getvalue()[held.getvalue().index("<svg") :]
        svg = svg.replace("<svg", f'<svg role="img" aria-label="{PICTURE}"', 1)
        return [nodes.raw("", f'<div class="drawn">{svg}</div>', format="html")]


class FormatVersions(SphinxDirective):
    """Say which version each kind of result has, from the constants in the code."""

    def run(self) -> list[nodes.Node]:
        """Return a table."""
        holder = nodes.container(classes=["wide-table"])
        self.state.nested_parse(StringList(format_versions(), source="lib"), 0, holder)
        return [holder]


def format_versions() -> list[str]:
    """Return a Markdown table of every VERSION and FORMAT in the engine, with what raises it."""
    lines, top = ["| module | version | raised when |", "|---|---|---|"], Path(patchsae.__file__).parent
    for path in sorted(top.rglob("*.py")):
        for name, number, why in VERSION.findall(path.read_text("utf-8")):
            module = ".".join(("patchsae", *path.relative_to(top).with_suffix("").parts))
            why = why.removeprefix("raised when ") or "the blocks have another form"
            lines.append(f"| `{module}` | `{name} = {number}` | {why} |")
    return lines


class Tuning(SphinxDirective):
    """Show what the search tried, and which recipe its rule chose."""

    def run(self) -> list[nodes.Node]:
        """Return a table and a sentence."""
        from patchbook.chapters.tuning import read_search  # it waits for torch, and most pages need not
        from patchbook.shipped import shelf

        self.env.note_dependency(str(shelf() / "search.csv"))
        holder = nodes.container(classes=["wide-table"])
        table, told = tuning(read_search())
        self.state.nested_parse(StringList(table, source="search.csv"), 0, holder)
        after = nodes.paragraph("", told)
        return [holder, after]


def tuning(search: Search) -> tuple[list[str], str]:
    """Return the search as lines of a Markdown table, and what its rule chose as a sentence."""
    head = "| recipe | L0 | FVU | of PCA | moved | accuracy kept | purity | of random weights | passes |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for one in search.candidates:
        numbers = (one.fvu, one.pca, 1 - one.cosine, one.kept, one.purity, one.untrained)
        cells = [f"{one.l0:.1f}", *(f"{value:.3f}" for value in numbers)]
        passes = "yes" if one.passes(search.width) else "no"
        lines.append(f"| {one.name} | {' | '.join(cells)} | {passes} |")
    fit = sum(one.passes(search.width) for one in search.candidates)
    chosen = search.chosen
    return lines, (
        f"{fit} of {len(search.candidates)} candidates pass. The purest latents among them are those of "
        f"“{chosen.name}”: {chosen.purity:.3f}, where random weights have {chosen.untrained:.3f}; on "
        f"average {chosen.l0:.1f} latents are active on a token of {search.width} dimensions."
    )


def add_take_line(app: Sphinx, name: str, source: list[str]) -> None:
    """Put a line with the chapter's own notebook below its title."""
    if not name.startswith(CHAPTERS):
        return
    notebook = json.loads(source[0])
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    title, _, rest = "".join(cell["source"]).partition("\n")
    cell["source"] = f"{title}\n\n{TAKE.format(name=name.removeprefix(CHAPTERS))}\n\n{rest}"
    source[0] = json.dumps(notebook)


def tidy_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Make what stands indented literal, formulas and drawings, and drop what says nothing."""
    if lines and lines[0].startswith(ALIAS):
        lines.clear()
    found: list[str] = []
    for i, line in enumerate(lines):
        begins = line.startswith("    ") and i > 1 and not lines[i - 1] and not lines[i - 2].startswith(" ")
        before = lines[i - 2] if i > 1 else ""
        if begins and not before.endswith("::") and (before.endswith(":") or what == "module"):
            found += ["::", ""]
        found.append(line)
    lines[:] = found


def _parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    holder = nodes.section()
    holder.document = directive.state.document
    nested_parse_with_titles(directive.state, StringList(lines, source=directive.env.docname), holder)
    return holder.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Register everything with Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", tidy_docstring, priority=100)  # before napoleon
    app.setup_extension("sphinx.ext.napoleon")
    app.connect("source-read", add_take_line)
    for name, directive in {
        "room": Room,
        "short-names": ShortNames,
        "rooms-picture": RoomsPicture,
        "tuning": Tuning,
        "format-versions": FormatVersions,
    }.items():
        app.add_directive(name, directive)
    missing = [] if importlib.util.find_spec("triton") else ["triton"]  # there is none on macOS and Windows
    app.config.autodoc_mock_imports = [*app.config.autodoc_mock_imports, *missing]
    return {"parallel_read_safe": True, "version": patchsae.__version__}
