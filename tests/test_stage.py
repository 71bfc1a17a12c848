"""Folders named by their inputs, and files that are whole or absent."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchsae.runs.cadence import Cadence
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import Stage, digest, jsonable, project_root, write_atomic, write_json
from patchsae.runs.stopping import Stopped, stoppable
from patchsae.runs.verify import verify_results

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    rates: tuple[float, ...] = (1e-3, 2e-3)


@given(JSON)
def test_digest_is_the_same_for_what_json_gives_back(value):
    assert digest(json.loads(json.dumps(jsonable(value)))) == digest(value)


def test_digest_ignores_key_order_and_sees_every_value():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1, "b": 2}) != digest({"a": 1, "b": 3})
    assert digest(Config()) == digest({"seed": 0, "rates": [1e-3, 2e-3]})
    assert digest(Config(seed=1)) != digest(Config())
    assert digest({"x": np.float64(0.5), "n": np.int64(3)}) == digest({"x": 0.5, "n": 3})


def test_digest_is_the_same_in_another_process():
    code = "from patchsae.runs.stage import digest; print(digest({'words': {'b', 'a', 'c'}, 'x': 0.1}))"
    for seed in "01":
        env = os.environ | {"PYTHONHASHSEED": seed}
        told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert told.stdout.strip() == digest({"words": ["a", "b", "c"], "x": 0.1})


def test_a_file_is_hashed_by_content_not_by_name(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("same")
    second.write_text("same")
    before = digest({"input": first})
    assert before == digest({"input": second})
    first.write_text("other")
    assert digest({"input": first}) != before


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(PatchSAEError, match="type object"):
        digest({"x": object()})


def test_a_stage_is_done_only_with_its_manifest(tmp_path):
    stage = Stage.open(tmp_path, "train", Config(), version=1)
    assert not stage.done
    (stage.path / "weights").write_text("half")
    assert not Stage.open(tmp_path, "train", Config(), version=1).done
    manifest = stage.finish(seed=7, steps=10)
    again = Stage.open(tmp_path, "train", Config(), version=1)
    assert again.done and again.path == stage.path
    assert not Stage.open(tmp_path, "train", Config(seed=1), version=1).done
    told = json.loads(manifest.read_text())
    assert told["seed"] == 7 and told["facts"] == {"steps": 10}
    assert told["versions"]["torch"] and told["versions"]["python"] and told["seconds"] >= 0


def test_a_raised_version_recomputes(tmp_path):
    made = []

    def make(version):
        stage = Stage.open(tmp_path, "train", Config(), version=version)
        return stage.once(lambda: (made.append(version), stage.finish()))

    assert make(1) == make(1) and made == [1]
    assert make(2) != make(1) and made == [1, 2]
    with pytest.raises(PatchSAEError, match="'version' among the inputs"):
        Stage.open(tmp_path, "train", {"version": 3}, version=1)
    with pytest.raises(TypeError, match="version"):
        Stage.open(tmp_path, "train", {})


def test_what_was_not_finished_is_made_again(tmp_path):
    stage = Stage.open(tmp_path, "train", Config(), version=1)
    with pytest.raises(KeyboardInterrupt):
        stage.once(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not stage.done
    assert stage.once(stage.finish) == stage.path and stage.done


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    stage = Stage.open(tmp_path, "train", Config(), version=1)
    for name in (".checkpoint-x1y2.safetensors", ".tmpsPz2QA", "checkpoint.safetensors"):
        (stage.path / name).write_text("half")
    with stage.alone():
        assert sorted(path.name for path in stage.path.iterdir()) == [".lock", "checkpoint.safetensors"]


def test_saving_takes_its_share_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("patchsae.runs.cadence.time.monotonic", lambda: now[0])
    cadence, saved = Cadence(0.1), []

    def save():
        saved.append(now[0])
        now[0] += 2.0  # what saving costs

    for _ in range(100):
        now[0] += 1.0  # a step
        cadence.save(save)
    assert saved[0] == 1.0  # the first tells the cost
    gaps = [after - before - 2.0 for before, after in zip(saved, saved[1:], strict=False)]
    assert gaps and all(gap == 20.0 for gap in gaps)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": {"seed": 99}}'])
def test_a_torn_or_foreign_manifest_is_not_trusted(tmp_path, text):
    stage = Stage.open(tmp_path, "train", Config(), version=1)
    stage.finish()
    (stage.path / "manifest.json").write_text(text)
    assert not stage.done


def test_write_atomic_leaves_the_old_file_and_no_rubbish_when_the_writer_fails(tmp_path):
    path = tmp_path / "numbers.json"
    write_json(path, [1])

    def fails(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fails)
    assert json.loads(path.read_text()) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]


def test_a_full_disk_is_one_sentence(tmp_path):
    def fills(temporary):
        with open("/dev/full", "w") as full:
            full.write("x")

    with pytest.raises(PatchSAEError, match="The disk is full, so .*free some space"):
        write_atomic(tmp_path / "big", fills)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PatchSAEError, match="Could not write"):
        write_json(tmp_path / "file" / "below" / "x.json", 1)
    with pytest.raises(PatchSAEError, match="Could not write"):
        Stage.open(tmp_path / "file", "train", {}, version=1)


def test_a_written_file_has_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_json(tmp_path / "x.json", 1).stat().st_mode == plain.stat().st_mode


def finished(root: Path) -> Stage:
    stage = Stage.open(root, "train", Config(), version=1)

    def make() -> None:
        (stage.path / "weights").write_bytes(b"12345678")
        stage.finish("weights")

    stage.once(make)
    return stage


def test_one_flipped_bit_is_seen_when_the_result_is_opened(tmp_path):
    stage = finished(tmp_path)
    (stage.path / "weights").write_bytes(b"12345679")
    with pytest.raises(PatchSAEError, match="weights is not the file that was made: copy .* or delete"):
        stage.once(None)


def test_a_result_is_hashed_once_and_then_known_by_size_and_time(tmp_path, monkeypatch):
    stage = finished(tmp_path)
    os.utime(stage.path / "weights", ns=(0, 0))
    stage.once(None)  # touched: hashed again
    monkeypatch.setattr("patchsae.runs.verify.file_digest", None)
    stage.once(None)


def test_a_result_of_an_older_version_is_made_anew_by_name(tmp_path):
    stage = finished(tmp_path)
    manifest = stage.manifest
    del manifest["format"]
    write_json(stage.path / "manifest.json", manifest | {"files": {"weights": 8}})
    with pytest.warns(UserWarning, match=f"{stage.path} was finished by an older version"):
        finished(tmp_path)
    assert stage.done


def test_a_stage_that_left_something_out_cannot_finish(tmp_path):
    stage = Stage.open(tmp_path, "train", Config(), version=1)
    with pytest.raises(PatchSAEError, match="lacks weights, so it cannot be finished"):
        stage.finish("weights")
    with pytest.raises(PatchSAEError, match="was not finished"):
        stage.once(lambda: None)


def test_all_results_below_a_folder_are_verified(tmp_path):
    one = finished(tmp_path)
    other = Stage.open(tmp_path, "train", Config(seed=5), version=1)
    other.finish()
    assert verify_results(tmp_path) == []
    stamp = (one.path / "weights").stat()
    (one.path / "weights").write_bytes(b"12345679")
    os.utime(one.path / "weights", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # what opening cannot see
    one.once(None)
    (other.path / "manifest.json").write_text("{")
    problems = verify_results(tmp_path)
    assert len(problems) == 2 and all("delete" in what and "\n" not in what for what in problems)
    assert any(f"{one.path / 'weights'} is not the file" in what for what in problems)
    assert any(f"{other.path / 'manifest.json'} is damaged" in what for what in problems)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_finished_result_is_read_where_nothing_can_be_written(tmp_path):
    stage = finished(tmp_path)
    stage.path.chmod(0o555)
    assert finished(tmp_path).path == stage.path


def test_a_signal_that_ends_a_command_lets_it_tidy_up():
    tidied, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="SIGTERM") as stopped, stoppable(lambda: tidied.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert tidied == [1] and stopped.value.code == 143
    assert signal.getsignal(signal.SIGINT) is before


def test_project_root_is_found_from_anywhere(tmp_path, monkeypatch):
    root = project_root()
    assert (root / "pyproject.toml").is_file()
    monkeypatch.chdir(tmp_path)
    assert project_root() == root
    monkeypatch.chdir(root / "lib" / "patchsae")
    assert project_root() == root


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_a_finished_result_that_lost_a_file_is_named(tmp_path, damage):
    stage = Stage.open(tmp_path, "atlas", {"a": 1}, version=1)

    def make() -> None:
        (stage.path / "x.zarr" / "count").mkdir(parents=True)
        (stage.path / "x.zarr" / "count" / "0.0").write_bytes(b"12345678")
        (stage.path / "part-0").write_bytes(b"left out: it is deleted after the manifest")
        stage.finish("x.zarr", images=3)
        (stage.path / "part-0").unlink()

    assert stage.once(make) == stage.once(make)
    sha256 = "ef797c8118f02dfb649607dd5d3f8c7623048c9c063d532cc95c5ed7a898a64f"
    assert stage.manifest["files"] == {"x.zarr/count/0.0": [8, sha256]}
    chunk = stage.path / "x.zarr" / "count" / "0.0"
    chunk.unlink() if damage == "lost" else chunk.write_bytes(b"1234")
    what = "is missing" if damage == "lost" else "has 4 bytes of 8"
    with pytest.raises(PatchSAEError, match=f"{chunk} {what}: copy the whole folder again, or delete"):
        stage.once(make)
