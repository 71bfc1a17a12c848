"""Tokens on disk, for other chapters that send the same pictures through the same tower."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from patchsae.clip.remembered import content_keys
from patchsae.runs.errors import brief

VERSION = 1  # raised when a row is written in another way
PAGE = 32_768  # bytes; the tokens of a picture are a hundred thousand and more
TYPES = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float16, torch.bfloat16)}
PATIENCE = 60  # seconds that a build waits while another one writes

T = TypeVar("T")


class TokenStore:
    """Hold tokens in one SQLite file, by the content of the pictures and of the tower that made them.

    It spares work and nothing else: where it cannot be read or written, or a row is damaged, tokens are
    computed as without it. It may be deleted at any time; several processes may use it. As from
    `Remembered`, a batch is taken whole or not at all.

    path: the file; its folder is made where it is missing.
    limit: bytes that the file may grow to. What comes later is computed and not kept.
    """

    def __init__(self, path: str | Path, limit: int):
        self.path, self.limit = Path(path), limit
        self.full = self.off = False

    def tokens(self, owner: str, images: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `run(images)`: tokens [B, T, d] of images [B, 3, H, W], for what `owner` names."""
        # other instructions of the processor round otherwise, and so may another torch
        maker = f"{owner} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
        keys = content_keys(maker, images)
        known = self._read(keys) if keys else None
        if known is not None:
            return known
        found = run(images)
        self._write(keys, found)
        return found

    def _read(self, keys: Sequence[bytes]) -> Tensor | None:
        def rows(base: sqlite3.Connection) -> list[Tensor] | None:
            found = []
            for key in keys:
                row = base.execute("SELECT shape, dtype, digest, data FROM tokens WHERE key = ?", [key])
                if (tokens := _tokens(row.fetchone())) is None:
                    return None
                found.append(tokens)
            return found

        found = self._ask(rows)
        alike = found and len({(row.shape, row.dtype) for row in found}) == 1
        return torch.stack(found) if alike else None

    def _write(self, keys: Sequence[bytes], found: Tensor) -> None:
        rows = []
        for key, row in zip(keys, found.contiguous(), strict=True):
            data = row.view(torch.uint8).numpy().tobytes()
            shape = " ".join(map(str, row.shape))
            rows.append((key, shape, str(row.dtype).removeprefix("torch."), _digest(data), data))

        def insert(base: sqlite3.Connection) -> None:
            base.execute("BEGIN IMMEDIATE")
            base.executemany("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?)", rows)
            base.execute("COMMIT")

        if rows and not self.full:
            self._ask(insert)

    def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T | None:
        """Return the answer of the file; None where it has none to give, which a warning says once."""
        if self.off:
            return None
        try:
            with closing(self._open()) as base:
                return question(base)
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
                self.off = True
                self._warn(f"cannot be used ({brief(error)}): delete it, and it is made anew")
            else:
                self.full = True
                if shutil.disk_usage(self.path.parent).free < self.limit:
                    self._warn("holds no more, because the disk is full")
        return None

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.path} {what}. Tokens are computed again instead.", stacklevel=5)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            version = base.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                base.close()
                self.path.unlink(missing_ok=True)
                return self._open()
            base.execute("PRAGMA synchronous = OFF")  # a row says by its digest whether it is whole
            base.execute(f"PRAGMA page_size = {PAGE}")
            if not version:
                base.execute("BEGIN IMMEDIATE")
                base.execute(
                    "CREATE TABLE IF NOT EXISTS tokens "
                    "(key BLOB PRIMARY KEY, shape TEXT, dtype TEXT, digest BLOB, data BLOB)"
                )
                base.execute(f"PRAGMA user_version = {VERSION}")
                base.execute("COMMIT")
            base.execute(f"PRAGMA max_page_count = {max(2, self.limit // PAGE)}")
        except BaseException:
            base.close()
            raise
        return base


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _tokens(row: tuple | None) -> Tensor | None:
    """Return what a row holds, None where it is missing or damaged."""
    try:
        shape, dtype, digest, data = row
        if _digest(data) != digest:
            return None
        sizes = tuple(map(int, shape.split()))
        return torch.frombuffer(bytearray(data), dtype=TYPES[dtype]).view(sizes)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):
        return None
