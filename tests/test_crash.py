"""Processes killed with SIGKILL end, resumed, with the bits of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr
from safetensors.torch import load_file

from patchsae.training.trainer import read_metrics

DRIVER = Path(__file__).with_name("crash.py")
CASES = {
    "no workers": {"execution": "sparse"},
    # without a pass over the first images, which would start workers of its own
    "two workers": {"workers": 2, "execution": "dense", "b_dec_init": "zeros"},
    "atlas": {"task": "describe"},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """All cases at once: they mostly wait for processes to start."""
    running = {}
    for seed, (case, options) in enumerate(CASES.items()):
        folder = tmp_path_factory.mktemp("crash")
        command = [sys.executable, str(DRIVER), str(folder), json.dumps(options), str(seed)]
        running[case] = folder, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return {
        case: (folder, json.loads(run.communicate(timeout=300)[0]))
        for case, (folder, run) in running.items()
    }


@pytest.mark.parametrize("case", ["no workers", "two workers"])
def test_a_run_killed_five_times_ends_with_the_same_bits(outcomes, case):
    folder, outcome = outcomes[case]
    assert outcome["whole"] == outcome["status"] == 0, outcome
    died_at = outcome["died_at"]
    assert len(died_at) == 5 and died_at == sorted(died_at) and 5 <= died_at[-1] < 200, outcome
    (whole,), (cut,) = ((folder / part).glob("sae-*") for part in ("whole", "cut"))
    assert whole.name == cut.name
    one, other = (load_file(part / "sae.safetensors") for part in (whole, cut))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    strip = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(part)]
        for part in (whole, cut)
    ]
    assert strip[0] == strip[1] and len(strip[0]) == 40
    # nothing half-written is left behind
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_an_atlas_killed_five_times_is_the_atlas_of_one_pass(outcomes):
    folder, outcome = outcomes["atlas"]
    assert outcome["whole"] == outcome["status"] == 0, outcome
    died_at = outcome["died_at"]
    assert len(died_at) == 5 and died_at == sorted(died_at) and 5 <= died_at[-1] < 60, outcome
    whole, cut = (
        xr.open_zarr(next((folder / part).glob("atlas-*/atlas.zarr")), consolidated=False).load()
        for part in ("whole", "cut")
    )
    assert whole.attrs["images"] == 240 and cut.identical(whole)
    assert not list(folder.glob("*/atlas-*/part-*")) and not list(folder.glob("*/atlas-*/.*-*"))


def test_no_worker_outlives_its_training_process(outcomes):
    outcome = outcomes["two workers"][1]
    assert outcome["workers_seen"] >= 8 and outcome["workers_left"] == 0, outcome


SCENARIO = """
mount -t tmpfs -o size=2m tmpfs "$1" || exit 77
exec "$2" -c '
import sys; sys.path.insert(0, sys.argv[2])
from test_crash import fill_the_disk
fill_the_disk(sys.argv[1])' "$1" "$3"
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """On a file system of 2 MB in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", SCENARIO, "sh"]
    command += [str(disk), sys.executable, str(DRIVER.parent)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if run.returncode == 77 or "unshare failed" in run.stderr or "Operation not permitted" in run.stderr:
        pytest.skip("no mount namespace may be made here")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["full", "same"]


def fill_the_disk(disk: str) -> None:
    """Fill the disk during training; free it and go on. Runs in a process of its own."""
    from crash import steps_saved, train

    from patchsae.runs.errors import PatchSAEError
    from patchsae.training import trainer as training

    root, filler, real = Path(disk, "results"), Path(disk, "filler"), training.write_atomic

    def write(path, write_fn):
        # after the seventh checkpoint something else takes all but 30 kB
        if steps_saved(root) == 7 and not filler.exists():
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
            filler.write_bytes(bytes(free - 30_000))
        return real(path, write_fn)

    training.write_atomic = write
    try:
        train(root, {})
    except PatchSAEError as error:
        assert "The disk is full, so" in str(error) and "checkpoint.safetensors was not written" in str(
            error
        )
        assert steps_saved(root) == 7
        print("full")
    (folder,) = root.glob("sae-*")
    assert not list(folder.glob(".*-*"))
    filler.write_bytes(b"")
    train(root, {})
    train(Path(disk, "whole"), {})
    one, other = (
        load_file(next(Path(disk, part).glob("sae-*/sae.safetensors"))) for part in ("results", "whole")
    )
    print("same" if all(one[name].equal(other[name]) for name in one) else "different")
