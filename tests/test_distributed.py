"""Training under a real torchrun, against one process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import SAE_CONFIG, train

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.processes import join, local_device
from patchsae.sae.step import Stepper
from patchsae.training.trainer import CHECKPOINT, read_metrics

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Train alone, by two processes, and by two that go on where one was stopped."""
    root = tmp_path_factory.mktemp("ranks")
    found = {
        "one": train(root / "one"),
        "cached by one": train(root / "one", cache=str(root / "one shards")),
    }
    with pytest.MonkeyPatch.context() as patch:
        real, steps = Stepper.step, []

        def step(self, *args):
            steps.append(1)
            if len(steps) == 14:
                raise KeyboardInterrupt
            return real(self, *args)

        patch.setattr(Stepper, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(root / "resumed")
    assert len(list(root.glob(f"resumed/sae-*/{CHECKPOINT}"))) == 1
    script = Path(__file__).with_name("two_processes.py")
    run = subprocess.run(
        [*TORCHRUN, "2", str(script), str(root)], capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found |= zip(("two", "resumed", "cached by two"), map(Path, run.stdout.split()), strict=True)
    return found


def distance(one: Path, other: Path) -> float:
    """Largest relative distance of a parameter."""
    a, b = (load_file(folder / "sae.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


@pytest.mark.parametrize("case", ["two", "resumed"])
def test_two_processes_end_where_one_does(folders, case):
    assert folders[case].name == folders["one"].name
    assert distance(folders["one"], folders[case]) < 1e-5
    one, other = (read_metrics(folders[name]) for name in ("one", case))
    assert len(one) == len(other) and max(row["ghost"] for row in one) > 0
    for a, b in zip(one, other, strict=True):
        counts = ("step", "images", "tokens", "lr")
        assert [a[name] for name in counts] == [b[name] for name in counts]
        for name in ("mse", "fvu", "cosine", "l0", "l1_norm", "ghost", "dead_share"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), (name, a["step"])


def test_two_processes_fill_one_cache(folders):
    assert distance(folders["cached by one"], folders["cached by two"]) < 1e-5


def test_only_one_process_writes(folders):
    names = [sorted(p.name for p in folders[name].iterdir()) for name in ("one", "two", "resumed")]
    assert names[0] == names[1] == names[2] and CHECKPOINT not in names[0]


def test_the_command_line_under_torchrun(tmp_path):
    arguments = [*"--images 16 --expansion 2 --token-batch 512 --quiet --out".split(), str(tmp_path)]
    command = [*TORCHRUN, "2", "-m", "patchbook.train", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    (folder,) = tmp_path.glob("sae-*")
    assert re.fullmatch(rf"{folder}: 3,152 tokens, mse .*\n", run.stdout)  # said once


def test_a_bad_environment_is_named(monkeypatch):
    assert SAE_CONFIG.d_in == 32 and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(PatchSAEError, match="WORLD_SIZE='two' is no number"):
        join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(PatchSAEError, match="WORLD_SIZE=2 is set but .*torchrun") as error:
        join("cpu")
    assert "\n" not in str(error.value)
    assert local_device("cpu") == "cpu" and "LOCAL_RANK" not in os.environ
