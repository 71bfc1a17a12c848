"""What an execution used: the modules of the library that it loaded, and the artefacts that it opened.

A chapter is executed again where one of these changed, and left alone where something else did. The
recorder runs inside the kernel; the rest needs no torch.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from patchsae.runs.stage import digest, file_digest, project_root, tree_digests, write_json

LIBRARY, ARTEFACTS = "lib", "artefacts"


def record(target: str) -> None:
    """Note in the file `target`, after every cell of this kernel, what was used so far.

    Modules are given by their path in the project. An artefact is a whole folder of `artefacts/`: what is
    read there is found through an index or a card, and compiled readers open files unseen by Python.
    """
    root, opened_files, path = project_root(), set(), Path(target)
    place, library = f"{root / ARTEFACTS}/", f"{root / LIBRARY}/"

    def opened(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            file = os.path.abspath(os.fsdecode(arguments[0]))
            if file.startswith(place):
                opened_files.add(f"{ARTEFACTS}/{file.removeprefix(place).split('/')[0]}")
            elif file.startswith(library) and not _compiled(file):  # a page's own program
                opened_files.add(file.removeprefix(f"{root}/"))

    def write(*_: object) -> None:
        write_json(path, sorted(_modules(root)) + sorted(opened_files))

    sys.addaudithook(opened)
    get_ipython().events.register("post_run_cell", write)  # noqa: F821  (the kernel's own)


def _compiled(file: str) -> bool:
    """Tell whether a file is code, found by `_modules`, or what Python and numba keep of it."""
    return file.endswith(".py") or "__pycache__" in Path(file).parts


def _modules(root: Path) -> set[str]:
    library, found = root / LIBRARY, set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(library):
            found.add(Path(file).relative_to(root).as_posix())
    return found


def used_digest(root: Path, used: Iterable[str]) -> str:
    """Hash what was used as it is now; what has gone counts as changed."""
    return digest({name: _digest_of(root / name) for name in used})


def _digest_of(path: Path) -> object:
    if path.is_dir():
        found = tree_digests(path, "**/*")
        return {
            file: value for file, value in found.items() if not file.endswith(".md")
        }  # cards for people
    if not path.is_file():
        return None
    if path.suffix != ".py":
        return file_digest(path)
    return code_digest(path.read_text(encoding="utf-8"))


@functools.cache
def code_digest(source: str) -> str:
    """Hash what Python code does: its text without comments, docstrings and layout.

    Code that cannot be parsed is hashed as it is.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return hashlib.sha256(source.encode()).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # a string alone does nothing, wherever it stands
            node.body = [one for one in node.body if not _is_text(one)] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def read_used(path: Path) -> list[str] | None:
    """Return what a recorder wrote, or None where there is nothing whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None
