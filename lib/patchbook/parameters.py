"""The parameters of a notebook: what its first cell declares, and a person's values read by it."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import yaml
from papermill.translators import PythonTranslator, papermill_translators

from patchbook.ranges import Range, check_ranges, ranges_of
from patchsae.runs.errors import PatchSAEError, printable


class Parameter(NamedTuple):
    """One assignment of the parameters cell: its type expression (None: any), source and comment."""

    name: str
    annotation: ast.expr | None
    source: str
    comment: str = ""


class _WithTuples(PythonTranslator):
    """Write parameters as Python; papermill's own makes text of a tuple."""

    @classmethod
    def translate(cls, val: Any) -> str:
        """Write one value."""
        if isinstance(val, tuple):
            return f"({''.join(f'{cls.translate(item)}, ' for item in val)})"
        return super().translate(val)


class _Core(yaml.SafeLoader):
    """Read YAML 1.2's core: in 1.1, which PyYAML reads, 010 is 8, 1:30 is 90, and yes is true."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern in (
    ("bool", "true|True|TRUE|false|False|FALSE"),
    ("null", "null|Null|NULL|none|None|~|"),
    ("int", r"[-+]?(0|[1-9]\d*)"),
    ("float", r"[-+]?(\.\d+|(0|[1-9]\d*)(\.\d*)?)([eE][-+]?\d+)?"),
):
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None)
papermill_translators.register("python", _WithTuples)


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """Read the names and types that a notebook's parameters cell declares.

    papermill.inspect_notebook reads line by line and so misses unions and values over several
    lines; the cell is Python, so Python's own parser reads it.
    """
    for cell in read_notebook(notebook).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", ()):
            break
    else:
        raise PatchSAEError(
            f"{notebook} has no code cell tagged 'parameters', so it takes none: "
            "add the tag to the cell that sets them."
        )
    try:
        statements = ast.parse(cell.source).body
    except SyntaxError as error:
        raise PatchSAEError(
            f"The parameters cell of {notebook} is not valid Python "
            f"({error.msg}, line {error.lineno}): it may hold plain assignments only."
        ) from error
    found = {}
    for statement in statements:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                comment = _comment(cell.source, statement)
                found[name] = Parameter(name, annotation, ast.unparse(value), comment)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                comment = _comment(cell.source, statement)
                found[name] = Parameter(name, _annotation_of(value), ast.unparse(value), comment)
    return found


def list_parameters(notebook: Path) -> str:
    """Write down every parameter of a notebook, a line each: type, default, legal values, comment."""
    declared = read_parameters(notebook)
    known = ranges_of(declared)
    lines = []
    for name, parameter in declared.items():
        kind = "" if parameter.annotation is None else f": {ast.unparse(parameter.annotation)}"
        notes = [str(known[name])] if name in known else []
        notes += [parameter.comment] if parameter.comment else []
        lines.append(f"{name}{kind} = {parameter.source}" + f"  # {'; '.join(notes)}" * bool(notes))
    return "\n".join(lines)


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given parameters with the types the notebook declares, or refuse them."""
    if not given:
        return {}
    declared = read_parameters(notebook)
    unknown = [name for name in given if name not in declared]
    if unknown:
        raise PatchSAEError(
            f"{notebook} has no parameter {_listed(unknown)}: "
            f"it takes {_listed(sorted(declared)) or 'none'}."
        )
    known = ranges_of(declared)
    typed = {
        name: _typed(notebook, declared[name], value, known.get(name)) for name, value in given.items()
    }
    check_ranges(typed, declared, notebook)
    return typed


def read_notebook(notebook: Path) -> nbformat.NotebookNode:
    if not notebook.is_file():
        raise PatchSAEError(f"There is no notebook {notebook}: check the path.")
    try:
        return nbformat.read(notebook, as_version=4)
    # nbformat converts before it validates, so a foreign file may raise anything at all.
    except Exception as error:
        raise PatchSAEError(
            f"{notebook} cannot be read as a notebook ({type(error).__name__}): "
            "open and save it in JupyterLab."
        ) from error


def _typed(notebook: Path, parameter: Parameter, value: Any, allowed: Range | None) -> Any:
    annotation = parameter.annotation
    if isinstance(value, str) and printable(value) != value:
        raise PatchSAEError(
            f"Parameter {parameter.name!r} of {notebook} is {value}, which is not UTF-8, as a notebook "
            "must be: rename the file or folder."
        )
    for candidate in _readings(value) if isinstance(value, str) else [value]:
        if annotation is None or _fits(candidate, annotation):
            whole = isinstance(candidate, int) and not isinstance(candidate, bool)
            wants_float = annotation is not None and _is_float(annotation)
            kind = _container(candidate, annotation)
            return float(candidate) if whole and wants_float else kind(candidate) if kind else candidate
    legal = f" ({allowed})" if allowed else ""
    raise PatchSAEError(
        f"Parameter {parameter.name!r} of {notebook} takes {ast.unparse(annotation)}{legal}, "
        f"not {value!r}: its default is {parameter.source}."
    )


def _readings(text: str) -> list[Any]:
    """List what a command-line value may mean, the text itself last.

    Python's reading comes first; what is none, such as true and [a, b], is read as YAML 1.2.
    """
    readings = []
    for read, error in (
        (ast.literal_eval, (ValueError, SyntaxError)),
        (lambda text: yaml.load(text, _Core), yaml.YAMLError),
    ):
        try:
            value = read(text)
        except error:
            continue
        if not isinstance(value, str):
            readings.append(value)
    return [*readings, text]


def _fits(value: Any, annotation: ast.expr) -> bool:
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as quoted):
            return _fits(value, ast.parse(quoted, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="list"), slice=element):
            return isinstance(value, (list, tuple)) and all(_fits(item, element) for item in value)
        case ast.Subscript(
            value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[element, ast.Constant(value=rest)])
        ):
            every = rest is ... and isinstance(value, (list, tuple))
            return every and all(_fits(item, element) for item in value)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=inside):
            elements = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            fitting = isinstance(value, (list, tuple)) and len(value) == len(elements)
            return fitting and all(map(_fits, value, elements))
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Name(id="list" | "tuple"):
            return isinstance(value, (list, tuple))
        case ast.Name(id="dict"):
            return isinstance(value, dict)
    # A type the runner cannot judge (Literal, Path, a class) is left to the notebook.
    return True


def _is_float(annotation: ast.expr) -> bool:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _is_float(left)
        case ast.Name(id=name):
            return name == "float"
    return False


def _container(value: Any, annotation: ast.expr | None) -> type | None:
    """Return what a list or tuple is to be, by the first part of its annotation that it fits."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _container(value, left if _fits(value, left) else right)
        case ast.Constant(value=str() as quoted):
            return _container(value, ast.parse(quoted, mode="eval").body)
        case ast.Subscript(value=ast.Name(id=name)) | ast.Name(id=name):
            kinds = {"list": list, "tuple": tuple}
            return kinds.get(name) if isinstance(value, (list, tuple)) else None
    return None


def _annotation_of(value: ast.expr) -> ast.expr | None:
    """Derive the type expression of a literal default; None and computed values may be anything."""
    try:
        default = ast.literal_eval(value)
    except ValueError:
        return None
    if default is None:
        return None
    name = type(default).__name__
    if isinstance(default, list):
        kinds = {type(item).__name__ for item in default}
        name = f"list[{kinds.pop()}]" if len(kinds) == 1 else "list"
    return ast.parse(name, mode="eval").body


def _comment(source: str, statement: ast.stmt) -> str:
    """Return what stands behind an assignment, or behind one of its lines."""
    lines = source.splitlines()[statement.lineno - 1 : statement.end_lineno]
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
    return "; ".join(t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
