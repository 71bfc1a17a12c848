"""Build the book: execute what changed, render it for a reader without a network, check it.

    python book/build.py            # _build/html
    python book/build.py --small    # _build/small/_build/html: tiny sizes, to see that all of it works
    python book/build.py --check    # builds nothing, and says what a build would make anew

Each notebook is executed through `patchbook.run` into a stage folder named by the hash of its code and of
what it used, so an interrupted build goes on where it stopped and a second build does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import yaml

from patchbook import gpu_page
from patchbook.executing import Executed, execute, outdated, with_text_of
from patchbook.parameters import read_notebook
from patchbook.publishing import publish
from patchbook.reliability import write_page
from patchbook.run import NotebookFailed
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import (
    digest,
    file_digest,
    project_root,
    tree_digests,
    versions,
    write_atomic,
    write_json,
)
from patchsae.runs.stopping import Stopped, end_with_parent, stoppable

REPORT = "book/report"  # a page that is made here
RELIABILITY = "book/reliability"  # another, from the last soak
GPUS = "book/gpus"  # another, from the files of `make gpu`
DIGEST = "book/digest.txt"  # and what the introduction includes of it, no page of its own
CARD = "book/data_card"  # a page whose pictures are drawn here
MATHJAX = "tex-svg-full.js"
DECIDING = {"images", "expansion", "l1", "ghost", "seed", "block", "model", "activation", "active"}
"""Parameters that decide which autoencoder a chapter reads."""
ONLY_OUTPUTS = re.compile(r"book/|lib/patchbook/(chapters|figures)/(?!tuning|architecture)")
"""Inputs of pages that no other page is read from: what they change is in `book/` too."""
SMALL = "book/small.yml"  # parameters of each notebook for a build whose numbers mean nothing


def pages(root: Path) -> list[str]:
    """Return the pages of the table of contents, in order, without suffix."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    found = [toc["root"]]

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if "file" in node:
                found.append(node["file"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(toc)
    return found


def execute_notebooks(
    root: Path, build: Path, parameters: dict[str, dict]
) -> tuple[dict[str, Executed], list[dict]]:
    """Bring every executed notebook in book/notebooks up to date with its inputs.

    Returns them by name, and what their figures are (`patchbook.publishing.publish`).

    `parameters` of a notebook by its name; those not there keep the notebook's own.
    """
    found = {Path(page).name: page for page in pages(root) if page.startswith("book/notebooks/")}
    # With other settings it is trained by whoever asks first, and the others wait.
    other = any(DECIDING & set(given) for given in parameters.values())
    shipped = (root / "artefacts" / "sae" / "index.json").is_file() and not other
    executed = execute(root, build, list(found), parameters, shipped)
    drawn: list[dict] = []
    for name in found:
        source = read_notebook(root / "notebooks" / f"{name}.ipynb")
        told = with_text_of(read_notebook(executed[name].path), source)
        drawn += publish(told, root / "notebooks" / f"{name}.ipynb", root / "book")
    return executed, drawn


def place(source: Path, target: Path) -> None:
    """Copy a file where the book reads it, unless the same is there already."""
    if not target.is_file() or file_digest(source) != file_digest(target):
        write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))


def bring_mathjax(root: Path) -> None:
    """Take MathJax, one file with no fonts to load, from the installed package that holds it."""
    for file in metadata.files("sphinx-mathjax-offline") or []:
        if file.name == MATHJAX:
            place(Path(file.locate()), root / "book" / "_static" / "vendor" / MATHJAX)
            return
    raise PatchSAEError(
        f"The package sphinx-mathjax-offline holds no {MATHJAX}: reinstall it (`make clean book`)."
    )


def bring_blocks(root: Path) -> None:
    """Copy the data that an explorer in an executed notebook names to where its page loads it from."""
    static, wanted = root / "book" / "_static" / "explorer", {}
    for page in (root / "book" / "notebooks").glob("*.ipynb"):
        for name in re.findall(r'data-blocks=\\"([^"\\]+)', page.read_text(encoding="utf-8")):
            wanted[Path(name).name] = root / name
    for name, folder in wanted.items():
        files = sorted(folder.glob("*.js"))
        if not files:
            raise PatchSAEError(
                f"{folder}, which a notebook's explorer shows, has gone: run `make clean book`."
            )
        for file in files:
            target = static / name / file.name
            if not target.is_file() or file_digest(file) != file_digest(target):
                from patchsae.explorer.blocks import read_block  # waits for torch

                read_block(folder, file.stem)  # the page runs it, and `results/` may be anybody's
            place(file, target)
    for stale in static.glob("*"):
        if stale.name not in wanted:
            shutil.rmtree(stale)


def write_report(root: Path, build: Path, executed: dict[str, Executed], drawn: list[dict]) -> None:
    """Make the reproduction report's page, its digest and report.json in `build`, unless up to date."""
    rows, page, told = build / "report.json", build / "report.md", build / "digest.txt"
    notebooks = tree_digests(root, "book/notebooks/*.ipynb")
    written_by = tree_digests(root, "book/report.py", "lib/patchbook/*.py")
    inputs = digest({"notebooks": notebooks, "writer": written_by})
    done = (
        all(map(Path.is_file, (rows, page, told))) and json.loads(rows.read_text()).get("inputs") == inputs
    )
    if not done:
        import report  # it waits for torch, which a build without changes need not

        manifests = {name: one.manifest for name, one in executed.items()}
        found = report.gather(root, manifests, drawn)
        report.write_page(root, found, page)
        report.write_digest(found, told)
        write_json(rows, found | {"inputs": inputs})
    place(page, root / f"{REPORT}.md")
    place(told, root / DIGEST)


def bring_card(root: Path) -> None:
    """Draw the pictures of the data card, unless they were drawn by the same code."""
    folder = root / "book" / "_static" / "card"
    made_by = digest({"code": tree_digests(root, "book/card.py", "lib/patchbook/scenes/*.py")})
    record = folder / "inputs.txt"
    if not (record.is_file() and record.read_text() == made_by):
        import card  # it waits for torch, which a build without changes need not

        card.draw_card(root / "book")
        write_atomic(record, lambda temporary: temporary.write_text(made_by))


def render(root: Path, build: Path) -> Path:
    """Render the pages with jupyter-book, where warnings are errors, unless they are up to date."""
    html = build / "html"
    record, index = html / "inputs.json", html / "index.html"
    inputs, before = _inputs_of_pages(root), _recorded(record)
    if before == inputs and not missing(root, html) and index.is_file():
        print("pages: unchanged", flush=True)
        return index
    changed = _changed(before, inputs) if before else []
    if before:
        print(f"pages: rendered again, as {_told(changed)}", flush=True)
    # Sphinx warns of what it reads when it reads it, and of links when it writes a page. Without pages all
    # are written; what it read for pages that were made whole was without a warning.
    shutil.rmtree(html, ignore_errors=True)
    if not before or not all(map(ONLY_OUTPUTS.match, changed)):
        shutil.rmtree(build / ".doctrees", ignore_errors=True)
    started = time.perf_counter()
    command = [Path(sys.executable).with_name("jupyter-book"), "build", root]
    command += ["--toc", root / "_toc.yml", "--config", root / "_config.yml"]
    command += ["--path-output", build.parent, "-W", "-n", "--keep-going", "--quiet"]
    # a build that is killed leaves nobody behind who writes into the next one's pages
    rendered = subprocess.run([str(word) for word in command], cwd=root, preexec_fn=end_with_parent)
    if rendered.returncode:
        raise PatchSAEError("jupyter-book refused the book: mend the warnings above, then rebuild.")
    # jupyter-book 2 ignores _toc.yml, builds nothing and says nothing.
    absent = missing(root, html)
    if absent:
        raise PatchSAEError(
            f"jupyter-book {metadata.version('jupyter-book')} built no page for "
            f"{', '.join(absent)}: reinstall the pinned versions (`make clean book`)."
        )
    sources = root / "book" / "_static" / "notebooks"  # left out as notebooks that are no page
    if sources.is_dir():
        shutil.copytree(sources, html / "_static" / "notebooks", dirs_exist_ok=True)
    write_json(record, inputs)
    print(f"pages: {time.perf_counter() - started:.1f} s", flush=True)
    return index


def up_to_date(root: Path, build: Path, parameters: dict[str, dict]) -> bool:
    """Say what a build would make anew, and tell whether that is nothing."""
    names = [Path(page).name for page in pages(root) if page.startswith("book/notebooks/")]
    stale = outdated(root, build, names, parameters)
    html = build / "html"
    absent = missing(root, html) or not (html / "index.html").is_file()
    if not stale and (absent or _recorded(html / "inputs.json") != _inputs_of_pages(root)):
        stale = ["pages"]
    print(f"to be made anew: {', '.join(stale)}" if stale else "everything is up to date")
    return not stale


def _inputs_of_pages(root: Path) -> dict[str, dict]:
    """Return what pages are made of: outputs, text, docstrings for the reference, cards, tables."""
    parts = ("book/**/*", "_config.yml", "_toc.yml", "lib/patch*/**/*.py")
    cards = ("artefacts/**/*.csv", "artefacts/**/*.json")
    return {"pages": tree_digests(root, *parts, *cards), "versions": versions()}


def _recorded(record: Path) -> dict[str, dict]:
    """Return what the pages were made of; nothing where no record says so."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        return {part: dict(found[part]) for part in ("pages", "versions")}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _changed(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """Name the inputs that are not as they were."""
    old, new = (
        {name: value for part in one.values() for name, value in part.items()} for one in (before, now)
    )
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _told(names: list[str]) -> str:
    """Say what made the pages again: the first three of it."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} changed" if names else "a page is missing"


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Wait until no other build works in this clone: all of them write into `book/`."""
    (root / "_build").mkdir(exist_ok=True)
    with (root / "_build" / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("another build is at work in this clone: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def missing(root: Path, html: Path) -> list[str]:
    """Return the pages of the table of contents that have no html."""
    return [page for page in pages(root) if not (html / f"{page}.html").is_file()]


def main() -> int:
    """Build the book and print the page to open."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help=f"take the notebooks' parameters from {SMALL}")
    parser.add_argument("--check", action="store_true", help="build nothing; fail if something has changed")
    given, started = parser.parse_args(), time.perf_counter()
    small = given.small
    try:
        root = project_root()
        build = root / "_build" / "small" / "_build" if small else root / "_build"
        parameters = yaml.safe_load((root / SMALL).read_text(encoding="utf-8")) if small else {}
        if given.check:
            return 0 if up_to_date(root, build, parameters) else 1
        with stoppable(), alone(root):
            executed, drawn = execute_notebooks(root, build, parameters)
            bring_mathjax(root)
            bring_blocks(root)
            if CARD in pages(root):
                bring_card(root)
            if REPORT in pages(root):
                write_report(root, build, executed, drawn)
            if RELIABILITY in pages(root):
                place(write_page(root, build / "reliability.md"), root / f"{RELIABILITY}.md")
            if GPUS in pages(root):
                place(gpu_page.write_page(root, build / "gpus.md"), root / f"{GPUS}.md")
            index = render(root, build)
            if REPORT in pages(root):
                place(build / "report.json", build / "html" / "report.json")
    except Stopped as stop:
        print(f"error: {stop} stopped the build; the same command goes on where it was.", file=sys.stderr)
        return stop.code
    except (PatchSAEError, NotebookFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"book: {time.perf_counter() - started:.1f} s")
    print(f"open {index.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
