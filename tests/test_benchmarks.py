"""The benchmark measures what it says: known sparsity, one objective, rows that the book can read."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from dataclasses import replace

import pytest
import torch
from packaging.utils import canonicalize_name
from tiny import tiny_backbone

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root
from patchsae.sae.model import SAE, SAEConfig

FOLDER = project_root() / "benchmarks"


def load(name: str):
    """Load a module of benchmarks/ the way run.py does, which leaves it out of sys.modules."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))  # as Python does for `python benchmarks/run.py`
    try:
        yield load("bench_sae_step")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def peers(bench):
    return bench.peers


def test_the_packages_compared_are_locked_beside_our_own():
    extras = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    ours, peers = (path / "requirements.lock" for path in (FOLDER.parent, FOLDER))
    ours, peers = (path.read_text().lower().splitlines() for path in (ours, peers))
    assert set(extras["bench"]) <= set(peers)
    assert all("==" in line for line in peers)
    names = [{canonicalize_name(line.split("==")[0]) for line in lines} for lines in (ours, peers)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("l0", [20, 150, 900])
def test_latents_fire_as_often_as_asked(bench, l0):
    problem = bench.Problem(2048, l0, d_in=64, tokens=4000, dead_share=0.25)
    (rows, b_enc, b_dec), batches, dead = bench.make_workload(problem)
    x = batches.flatten(0, 1)
    active = (x - b_dec) @ rows.T + b_enc > 0
    assert active.sum(-1).float().mean().item() == pytest.approx(l0, rel=0.03)
    assert not active[:, dead].any() and dead.sum() == 512
    share = active[:, ~dead].float().mean(0)
    assert share.quantile(0.99) > 4 * share.median() or l0 == 900  # heavy-tailed, unless all must fire


def test_a_workload_survives_the_file_and_depends_on_the_seed_only(bench, tmp_path):
    problem = bench.Problem(64, 4, d_in=16, tokens=32)
    workload = bench.make_workload(problem)
    bench.save_workload(tmp_path / "w.safetensors", workload)
    again = bench.load_workload(tmp_path / "w.safetensors")
    for other in (again, bench.make_workload(problem)):
        assert torch.equal(other.batches, workload.batches) and torch.equal(other.dead, workload.dead)
        assert all(map(torch.equal, other.weights, workload.weights))
    assert not torch.equal(bench.make_workload(replace(problem, seed=1)).batches, workload.batches)


@pytest.mark.parametrize("dead_share", [0.0, 0.5])
def test_the_released_step_has_the_objective_of_the_library(bench, peers, dead_share):
    """Its gradients too: the description in facts.md §4.1 and §4.2 was read alike twice."""
    problem = bench.Problem(128, 6, d_in=16, tokens=64, dead_share=dead_share)
    workload = bench.make_workload(problem)
    setting, x = bench.setting(workload, problem), workload.batches[0]
    released = peers.Released(workload.weights, setting)
    sae = SAE(SAEConfig(d_in=16, expansion=8, l1=setting.l1))
    rows, b_enc, b_dec = workload.weights
    sae.load_state_dict({"W_enc": rows, "b_enc": b_enc, "W_dec": rows, "b_dec": b_dec})
    total, (loss, latents) = sae.losses(x, setting.dead).total, released.loss(x)
    torch.testing.assert_close(latents, sae.encode(x))
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    total.backward()
    loss.backward()
    W_enc, b_enc, W_dec, b_dec = (p.grad for p in released.parameters)
    theirs = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    for name, parameter in sae.named_parameters():
        # the guards against division by zero sit at other places in the ghost term
        assert (theirs[name] - parameter.grad).norm() < 1e-2 * parameter.grad.norm(), name


def test_steps_written_here_compute_what_they_promise(bench, peers):
    bench.verify([*bench.ours(), bench.AUTO, bench.DENSE, *peers.WRITTEN_HERE])


def test_a_step_of_another_objective_is_refused(bench, peers, monkeypatch):
    monkeypatch.setattr(peers.Plain, "error", staticmethod(peers.mean_square))
    with pytest.raises(PatchSAEError, match="another loss"):
        bench.verify([peers.PLAIN])


@pytest.mark.parametrize("name", ["sae-lens", "overcomplete", "saev", "eai-sparsify"])
def test_packages_compute_what_their_adapters_promise(bench, peers, name):
    if (
        name in peers.missing()
    ):  # importorskip cannot be used: overcomplete needs its adapter's help to import
        pytest.skip(f"{name} is not installed here; `make bench` checks it in .bench-venv")
    bench.verify([name])


def test_rows_have_the_keys_of_the_result_file(bench, peers, monkeypatch):
    keys = load("run").ROW
    monkeypatch.setattr(peers, "missing", lambda: list(peers.PACKAGES))
    monkeypatch.setitem(bench.GOALS, (512, 8, bench.FLOAT32), 5.0)
    monkeypatch.setattr(bench, "_peak_elsewhere", lambda title, name, path, problem: 1e3 + len(name))
    rows = bench.run(quick=True)
    assert all(set(row) == keys for row in rows)
    assert len({(row["name"], row["other_name"]) for row in rows}) == len(rows)
    assert all(row["min"] <= row["max"] and row["ratio"] > 0 and row["n"] > 0 for row in rows)
    (aimed,) = [row for row in rows if row["goal"] == 5.0]
    others = {row["other_name"] for row in rows if row["name"] == aimed["name"]}
    assert others == {peers.PLAIN, peers.RELEASED}
    best = max(row["best_other"] for row in rows if row["name"] == aimed["name"])
    assert aimed["best_other"] == best


def test_peak_memory_is_that_of_the_step_in_a_process_of_its_own(bench, peers, tmp_path):
    problem = bench.Problem(4096, 20, d_in=64, tokens=1024)
    bench.save_workload(tmp_path / "w.safetensors", bench.make_workload(problem))
    found = bench._peak_elsewhere("peak", peers.PLAIN, tmp_path / "w.safetensors", problem)
    parameters, latents = 4 * 2 * 4096 * 64 / 1e6, 4 * 1024 * 4096 / 1e6
    assert 3 * parameters + latents < found < 4 * parameters + 8 * latents


def test_a_comparison_without_its_competitors_is_refused(bench, peers, monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda: ["sae-lens"])
    with pytest.raises(PatchSAEError, match="sae-lens not installed; `make bench`"):
        bench.check_setup(quick=False)


def test_an_allocator_that_slows_everybody_is_warned_of(bench, monkeypatch, capsys):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    bench.check_setup(quick=True)
    assert "GLIBC_TUNABLES" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["fpu avx512_bf16", "fpu amx_bf16 avx512_bf16"])
def test_goals_of_bf16_candidates_are_for_matrix_units(bench, monkeypatch, flags):
    monkeypatch.setattr("measure.Path.read_text", lambda path, encoding: f"flags : {flags}")
    assert bench.goal_of(bench.BF16, 10.0) == (10.0 if "amx" in flags else None)
    assert bench.goal_of(bench.FLOAT32, 5.0) == 5.0 and bench.goal_of(bench.BF16, None) is None


def test_the_passes_count_alike_and_memory_has_a_limit(bench, monkeypatch):
    atlas = load("bench_atlas")  # `bench` has made its neighbours importable
    small = {"TOKENS": 5, "CLASSES": 3, "BATCH": 2, "SIZES": (2, 4), "ROUNDS": 1}
    for name, value in small.items():
        monkeypatch.setattr(atlas, name, value)
    monkeypatch.setattr(atlas, "PROBLEM", bench.Problem(256, 8, d_in=32, tokens=10, batches=2))
    monkeypatch.setattr(atlas, "_draw", lambda seconds, name: None)
    monkeypatch.setattr(
        atlas, "_peak_elsewhere", lambda name, _: 2700.0 if name == atlas.RELEASED else 90.0
    )
    rows = atlas.run()
    assert all(set(row) == load("run").ROW and row["ratio"] > 0 for row in rows)
    memory = [row for row in rows if row["unit"] == "MB"]
    assert memory and all(row["goal"] == 27 and row["ratio"] == 30 for row in memory)


def test_the_masking_sweep_is_compared_with_equal_logits(bench, monkeypatch):
    masking = load("bench_masking")
    small = {"CLASSES": 5, "EXPANSION": 4, "L0": 10, "BATCH": 2, "IMAGES": 4, "ROUNDS": 2, "TIMED_MASKS": 1}
    for name, value in small.items():
        monkeypatch.setattr(masking, name, value)
    monkeypatch.setattr(masking, "load_backbone", lambda name, block: tiny_backbone())
    rows = masking.run()
    assert all(set(row) == load("run").ROW and row["ratio"] > 0 for row in rows)
    assert [row["goal"] for row in rows] == [20.0, None] and "42 masks, 128 latents" in rows[0]["name"]
    monkeypatch.setattr(masking, "rerun", lambda sae, backbone, pixels, on: torch.ones(len(pixels), 16))
    with pytest.raises(PatchSAEError, match="logits differ by"):
        masking.run()
