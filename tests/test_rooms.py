"""The house: arrows between rooms go one way, the engine never imports the book, and no file is long."""

import ast
from pathlib import Path

import pytest

from patchsae.runs.stage import project_root

LIB = project_root() / "lib"
# each room imports only from those before it
ROOMS = ("runs", "images", "clip", "sae", "training", "latents", "masking", "adaptation", "explorer")
LONGEST = 400
FILES = sorted(file for top in ("patchsae", "patchbook") for file in (LIB / top).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Return the modules of this project that a file names, also inside functions and for types."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write imports from the top, so that arrows can be read"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name and name.split(".")[0] in ("patchsae", "patchbook")}


def room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "patchsae" and len(parts) > 1 and parts[1] in ROOMS else None


def test_every_room_is_there_and_says_what_belongs_in_it():
    assert {path.name for path in (LIB / "patchsae").iterdir() if (path / "__init__.py").exists()} == set(
        ROOMS
    )
    for name in ROOMS:
        text = ast.get_docstring(ast.parse((LIB / "patchsae" / name / "__init__.py").read_text("utf-8")))
        assert "belongs" in text and text.count(".") >= 3, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(LIB)))
def test_arrows_go_one_way(file):
    names, own = imported(file), file.relative_to(LIB).parts
    if own[0] == "patchsae":
        assert not [name for name in names if name.startswith("patchbook")], "the engine imports the book"
        if len(own) > 2:
            here = ROOMS.index(own[1])
            later = {name for name in names if room(name) and ROOMS.index(room(name)) > here}
            assert not later, f"{own[1]} comes before {later}"
    assert len(file.read_text("utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("top", ["patchsae", "patchbook"])
def test_no_module_needs_itself(top):
    """No cycle among modules, imports inside functions and for types left out."""
    graph = {}
    for file in FILES:
        name = ".".join(file.relative_to(LIB).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text("utf-8"))
        graph[name] = {
            full
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for full in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        }
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join([*path, name])
        if state.get(name) or name not in graph:
            return
        state[name] = 1
        for other in sorted(graph[name] - {name}):
            visit(other, (*path, name))
        state[name] = 2

    for name in graph:
        if name.startswith(top):
            visit(name, ())
