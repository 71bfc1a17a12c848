"""What a chapter keeps: the same again, nothing damaged, nothing of another code."""

from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from patchbook import kept
from patchsae.runs.errors import PatchSAEError


class Which(StrEnum):
    ONE = "one"


class Inner(NamedTuple):
    value: float
    low: float | None


class Found(NamedTuple):
    areas: dict[tuple[str, int | None], np.ndarray]
    by: dict[Which, Inner]
    empty: np.ndarray
    right: np.ndarray


def make() -> Found:
    areas = {("a", None): np.arange(3)[::-1], ("b", 5): np.array([np.nan, 1.0], np.float32)}
    by = {Which.ONE: Inner(np.float32(0.5), None)}
    return Found(areas, by, np.zeros((2, 0)), np.array([[True, False]]))


def test_what_is_kept_comes_back_and_is_made_once(tmp_path):
    calls = []

    def once() -> Found:
        calls.append(1)
        return make()

    first, again = (kept.keep(tmp_path, "found", Found, once, {"n": 3}) for _ in range(2))
    assert len(calls) == 1
    for found in (first, again):  # the first is read, too
        assert type(found) is Found and found.by == {Which.ONE: Inner(0.5, None)}
        for key, values in make().areas.items():
            np.testing.assert_array_equal(found.areas[key], values)
            assert found.areas[key].dtype == values.dtype
        assert found.empty.shape == (2, 0) and found.right.dtype == bool
        found.right[0, 0] = False  # nobody else's
    kept.keep(tmp_path, "found", Found, once, {"n": 4})
    assert len(calls) == 2


def test_another_code_makes_it_anew_and_figures_do_not(tmp_path, monkeypatch):
    calls, digests = [], kept.tree_digests

    def value() -> int:
        calls.append(1)
        return 1

    def keep_with(changed: str, version: int | None = None) -> None:
        kept._code.cache_clear()
        monkeypatch.setattr(kept, "tree_digests", lambda *of: digests(*of) | {changed: "other"})
        kept.keep(tmp_path, "n", int, value, {}, version)

    try:
        keep_with("patchbook/figures/masking.py")
        kept._code.cache_clear()
        monkeypatch.undo()
        kept.keep(tmp_path, "n", int, value, {})
        assert len(calls) == 1
        keep_with("patchsae/lens.py")
        assert len(calls) == 2
        # what has a version is made anew with the next one alone
        for version in (1, 1, 2):
            keep_with(f"patchsae/{version}.py", version)
        assert len(calls) == 4
    finally:
        kept._code.cache_clear()


def test_damage_and_other_types_are_refused_by_name(tmp_path):
    kept.keep(tmp_path, "found", Found, make, {})
    (path,) = tmp_path.rglob(kept.RESULT)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PatchSAEError, match=r"kept\.msgpack.*(copy the whole folder|delete)"):
        kept.keep(tmp_path, "found", Found, make, {})
    path.write_bytes(whole)
    with pytest.raises(PatchSAEError, match=r"kept\.msgpack' is damaged .*delete .*found-"):
        kept.keep(tmp_path, "found", int, make, {})
    with pytest.raises(PatchSAEError, match=r"kept\.msgpack' is damaged .*ndarray.*delete .*found-"):
        kept.keep(tmp_path, "found", tuple[dict, dict, Path, np.ndarray], make, {})
    with pytest.raises(TypeError, match="Path cannot be kept"):
        kept.keep(tmp_path, "path", dict, lambda: {"a": Path()}, {})
