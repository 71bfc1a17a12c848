"""What files hold: a hash of each, and whether it can be decoded, found out once on a machine.

To read ImageNet's 150 GB takes from ten minutes to an hour, so what was found is kept in
`$PATCHSAE_CACHE/contents` (else in `~/.cache/patchsae`), in one file for each folder of images. A file is
known again by its path, size and time of change; one that was merely touched is read again, and found to
be the same. Deleting the cache costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from patchsae.images.reading import VERSION, read_image
from patchsae.runs.disk import write_atomic
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.progress import progress_bar

BYTES = 16  # of a key, and of what is known about it
SAVE_SECONDS = 60.0  # what a killed pass loses at most
SETTLED_NS = 2 * 10**9  # a file younger than this may change again within the tick of its clock
READERS = 8  # threads: they wait for the disk, or decode without the interpreter
PART = 1024  # files handed to them at a time
NAMED = 5  # files that an error names

T = TypeVar("T")


class Memory:
    """Notes of 16 bytes on what is found by keys of 16 bytes, in a file that tells when it is damaged."""

    def __init__(self, root: Path):
        name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self.path = _cache() / "contents" / name
        self.notes: dict[bytes, bytes] = {}
        self._new, self._saved_at = 0, time.monotonic()
        with contextlib.suppress(OSError):
            content = self.path.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                self.notes = {
                    content[at : at + BYTES]: content[at + BYTES : at + 2 * BYTES]
                    for at in range(32, len(content), 2 * BYTES)
                }

    def note(self, key: bytes, value: bytes) -> None:
        """Keep a note, and now and then save all."""
        self.notes[key], self._new = value, self._new + 1
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is new; where nothing can be written it is found out again next time."""
        if self._new:
            content = b"".join(part for pair in self.notes.items() for part in pair)
            whole = hashlib.sha256(content).digest() + content
            with contextlib.suppress(PatchSAEError):
                write_atomic(self.path, lambda temporary: temporary.write_bytes(whole))
        self._new, self._saved_at = 0, time.monotonic()


def content_digests(root: Path, names: Sequence[str]) -> Iterator[bytes]:
    """Yield a hash of 16 bytes of the content of each file below a folder, in order.

    Raises
    ------
    PatchSAEError : a file is missing or cannot be read.
    """
    memory = Memory(root)

    def find(name: str) -> tuple[bytes, bytes | None, bool]:
        path = f"{root}/{name}"
        try:
            found = os.stat(path)
            key = _short(os.fsencode(f"{name}\0{found.st_size} {found.st_mtime_ns}"))
            if (known := memory.notes.get(key)) is not None:
                return key, known, False
            with open(path, "rb") as stream:
                value = hashlib.file_digest(stream, "sha256").digest()[:BYTES]
            return key, value, time.time_ns() - found.st_mtime_ns > SETTLED_NS
        except OSError as error:
            raise PatchSAEError(f"cannot read image '{path}' ({error.strerror}); put it back.") from error

    try:
        for key, value, new in _threaded(find, names, f"reading the files of '{root}' once"):
            if new:
                memory.note(key, value)
            yield value
    finally:
        memory.save()


def check_decodable(root: Path, names: Sequence[str], name: str) -> None:
    """Decode every file below a folder that was never decoded, before long work depends on them.

    Raises
    ------
    PatchSAEError : counts the files that cannot be read, and names the first with the reason.
    """
    memory = Memory(root)

    def find(pair: tuple[str, bytes]) -> tuple[bytes, str | None]:
        name, content = pair
        key = _short(b"decoded %d " % VERSION + content)
        if key in memory.notes:
            return key, None
        try:
            read_image(Path(f"{root}/{name}"), f"image '{root}/{name}'", small=True)
            return key, ""
        except PatchSAEError as error:
            return key, str(error).rstrip(".")

    bad: list[str] = []
    pairs = list(zip(names, content_digests(root, names), strict=True))
    try:
        for key, problem in _threaded(find, pairs, f"decoding the files of '{root}' once"):
            if problem:
                bad.append(problem)
            elif problem is not None:
                memory.note(key, b"\1" * BYTES)
    finally:
        memory.save()
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise PatchSAEError(
            f"{len(bad)} of the {len(names)} files of '{name}' that are needed cannot be used, and nothing "
            f"was begun: {'; '.join(bad[:NAMED])}{more}."
        )


def _threaded(task: Callable[..., T], items: Sequence, title: str) -> Iterator[T]:
    # in parts, so that an error is seen before a million files are waited for
    with ThreadPoolExecutor(READERS) as pool:
        bar = progress_bar(total=len(items), desc=title, unit="file", shown=len(items) > 10_000)
        with bar:
            for start in range(0, len(items), PART):
                yield from pool.map(task, part := items[start : start + PART])
                bar.update(len(part))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PATCHSAE_CACHE") or f"{base}/patchsae").expanduser()


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=BYTES).digest()
