"""The table of legal values and the notebooks' own: no default, no committed setting is refused by it."""

import ast

import yaml

from patchbook.parameters import read_parameters
from patchbook.ranges import MARKS, RANGES
from patchsae.runs.stage import project_root

ROOT = project_root()


def settings(value: dict, where: str):
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from settings(inner, f"{where}/{name}")
        else:
            yield where, name, inner


def test_every_default_and_every_committed_setting_is_in_range():
    found = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        declared = read_parameters(path)
        assert set(declared) >= MARKS, path
        found += [(path.name, name, ast.literal_eval(p.source)) for name, p in declared.items()]
    for path in [ROOT / "book" / "small.yml", *sorted((ROOT / "workflow").glob("*.yaml"))]:
        found += settings(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)
    known = [(where, name, value) for where, name, value in found if name in RANGES]
    assert len(known) > 100
    assert not [one for one in known if not RANGES[one[1]].holds(one[2])]
    numbers = {name for where, name, value in found if type(value) in (int, float) and where[0].isdigit()}
    assert numbers <= RANGES.keys()
