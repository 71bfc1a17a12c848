"""Tokens on disk are those that the tower would give; a store that fails costs time and nothing else."""

import os
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_remembered import images
from tiny import tiny_backbone

from patchsae.clip import token_store
from patchsae.clip.token_store import TokenStore

LIMIT = 10_000_000


@pytest.fixture
def asked(monkeypatch):
    """Return a list of how many images a tower was asked for."""
    found, whole = [], type(tiny_backbone()).in_parts
    monkeypatch.setattr(
        type(tiny_backbone()),
        "in_parts",
        lambda self, run, batch: (found.append(len(batch)), whole(self, run, batch))[1],
    )
    return found


@torch.no_grad()
def through(path: Path, x, limit: int = LIMIT, backbone=None):
    """Return what a process makes that meets the store for the first time."""
    backbone = backbone or tiny_backbone()
    with backbone.remembering(TokenStore(path, limit)):
        return backbone.residual(x)


@torch.no_grad()
def test_another_process_finds_the_same_bits(tmp_path, asked):
    path, backbone = tmp_path / "new" / "tokens.sqlite", tiny_backbone()
    x = images(backbone)
    plain = backbone.residual(x)
    first = through(path, x)
    asked.clear()
    again, part = through(path, x), through(path, x[[2, 0]])
    assert asked == [] and torch.equal(first, plain)
    assert torch.equal(again, plain) and torch.equal(part, plain[[2, 0]]) and again.dtype == plain.dtype


@torch.no_grad()
def test_other_blocks_weights_and_pictures_are_computed(tmp_path, asked):
    path, backbone = tmp_path / "tokens.sqlite", tiny_backbone()
    x = images(backbone)
    through(path, x)
    earlier, other = backbone.at_block(backbone.block - 1), tiny_backbone()
    other.model.visual.conv1.weight.mul_(1.5)
    for model in (earlier, other):
        assert torch.equal(through(path, x, backbone=model), model.residual(x))
    asked.clear()
    through(path, images(backbone, seed=1))
    assert asked == [4]


@torch.no_grad()
def test_outside_of_the_block_nothing_is_kept(tmp_path, asked):
    backbone = tiny_backbone()
    x = images(backbone, 1)
    with backbone.remembering(TokenStore(tmp_path / "tokens.sqlite", LIMIT)):
        pass
    backbone.residual(x), backbone.residual(x)
    assert asked == [1, 1] and not list(tmp_path.iterdir())


def change(path: Path, command: str) -> None:
    with sqlite3.connect(path) as base:
        base.execute(command)
    base.close()


@pytest.mark.parametrize(
    "command",
    [
        "UPDATE tokens SET data = zeroblob(length(data))",
        "UPDATE tokens SET data = substr(data, 1, 100)",
        "UPDATE tokens SET shape = '3 3'",
        "UPDATE tokens SET dtype = 'int64'",
        "UPDATE tokens SET dtype = NULL",
        "DELETE FROM tokens WHERE rowid = 2",
        "PRAGMA user_version = 99",
    ],
)
@torch.no_grad()
def test_what_is_damaged_missing_or_of_another_version_is_made_again(tmp_path, asked, command):
    path, backbone = tmp_path / "tokens.sqlite", tiny_backbone()
    x = images(backbone)
    plain = through(path, x)
    change(path, command)
    asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(through(path, x), plain) and asked == [4]
        assert torch.equal(through(path, x), plain) and asked == [4]


@pytest.mark.parametrize("content", [b"no database at all" * 1000, b"SQLite format 3\0" + bytes(5000)])
@torch.no_grad()
def test_a_file_that_is_no_store_is_named_once_and_left(tmp_path, asked, content):
    path, backbone = tmp_path / "tokens.sqlite", tiny_backbone()
    path.write_bytes(content)
    x, plain = images(backbone), backbone.residual(images(backbone))
    with pytest.warns(UserWarning, match=r"tokens\.sqlite cannot be used .*: delete it") as told:
        with backbone.remembering(TokenStore(path, LIMIT)):
            assert all(torch.equal(backbone.residual(x), plain) for _ in range(3))
    assert len(told) == 1 and path.read_bytes() == content


@torch.no_grad()
def test_a_full_store_computes_what_it_does_not_hold_and_says_nothing(tmp_path, asked):
    path, backbone = tmp_path / "tokens.sqlite", tiny_backbone()
    x = images(backbone, 64)
    limit = 8 * token_store.PAGE
    with warnings.catch_warnings(), backbone.remembering(TokenStore(path, limit)):
        warnings.simplefilter("error")
        found = torch.cat([backbone.residual(part) for part in x.split(4)])
    assert torch.equal(found, tiny_backbone().residual(x)) and path.stat().st_size <= limit
    asked.clear()
    through(path, x[:4], limit)
    through(path, x[-4:], limit)
    assert asked == [4]  # the first are there, the last are not


@torch.no_grad()
def test_a_full_disk_is_said_and_the_work_goes_on(tmp_path, monkeypatch):
    path, backbone = tmp_path / "tokens.sqlite", tiny_backbone()
    x = images(backbone, 64)
    monkeypatch.setattr(token_store.shutil, "disk_usage", lambda _: type("", (), {"free": 0})())
    with pytest.warns(UserWarning, match="because the disk is full") as told:
        with backbone.remembering(TokenStore(path, 8 * token_store.PAGE)):
            found = torch.cat([backbone.residual(part) for part in x.split(4)])
    assert torch.equal(found, tiny_backbone().residual(x)) and len(told) == 1


@pytest.mark.skipif(os.getuid() != 0 or not Path("/dev/full").exists(), reason="mounts a small disk")
@torch.no_grad()
def test_a_real_disk_that_is_full_leaves_nothing_that_is_believed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("may not mount here")
    try:
        backbone = tiny_backbone()
        x = images(backbone, 64)
        with pytest.warns(UserWarning, match="because the disk is full"):
            with backbone.remembering(TokenStore(disk / "tokens.sqlite", LIMIT)):
                found = torch.cat([backbone.residual(part) for part in x.split(4)])
        plain = tiny_backbone().residual(x)
        assert torch.equal(found, plain)
        assert torch.equal(torch.cat([through(disk / "tokens.sqlite", part) for part in x.split(4)]), plain)
    finally:
        subprocess.run(["umount", disk], check=True)


WRITER = """
import sys, torch
sys.path.insert(0, "tests")
from test_token_store import through
from test_remembered import images
from tiny import tiny_backbone
x = images(tiny_backbone(), 48)
for part in x.split(2):
    through(sys.argv[1], part)
print("done")
"""


@torch.no_grad()
def test_two_processes_and_one_that_is_killed_share_a_store(tmp_path, asked):
    root, path = Path(__file__).parents[1], tmp_path / "tokens.sqlite"
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    while not path.exists() or path.stat().st_size < 4 * token_store.PAGE:
        assert started[0].poll() in (None, 0)
    started[0].kill()
    assert [one.communicate()[0] for one in started[1:]] == ["done\n"] * 2
    started[0].communicate()
    x = images(tiny_backbone(), 48)
    plain = tiny_backbone().residual(x)
    asked.clear()
    assert torch.equal(torch.cat([through(path, part) for part in x.split(2)]), plain) and asked == []
