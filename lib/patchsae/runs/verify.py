"""What a finished result consists of: recorded when it is finished, looked at whenever it is opened.

A manifest holds the size and the sha256 of every file of its result. Hashing them all at every opening
would cost more than reading most results does; so what was hashed once is remembered with its time of
change, as git's index does, and an opening asks the system for sizes and times only. A file that was
touched, copied or exchanged since is hashed again. `verify_results` hashes everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from patchsae.runs.disk import file_digest, sync
from patchsae.runs.errors import PatchSAEError, brief

MANIFEST = "manifest.json"
SEEN = ".checked.json"  # sizes and times of files whose content was found right
FORMAT = 2  # of manifests; from 2 on they hold the hashes of what was made

Files = dict[str, list]  # path below the folder, with '/': [size in bytes, sha256]


def record_files(folder: Path, patterns: Iterable[str]) -> Files:
    """Make the files and folders that match the patterns last; return what a manifest says of them.

    Raises
    ------
    PatchSAEError : nothing matches a pattern, so that the result is not whole.
    """
    found: Files = {}
    folders = {folder, folder.parent}
    for pattern in patterns:
        inside = [list(path.rglob("*")) if path.is_dir() else [path] for path in folder.glob(pattern)]
        files = sorted(path for paths in inside for path in paths if path.is_file())
        if not files:
            raise PatchSAEError(f"{folder} lacks {pattern}, so it cannot be finished: run again.")
        for path in files:
            sync(path)
            folders |= {parent for parent in path.parents if parent.is_relative_to(folder)}
            found[path.relative_to(folder).as_posix()] = [path.stat().st_size, file_digest(path)]
    for path in sorted(folders, key=lambda path: -len(path.parts)):  # names, too, the deepest first
        sync(path)
    _remember(folder, found)
    return found


def changed_files(folder: Path, files: Files, thorough: bool = False) -> Iterator[str]:
    """Yield a clause on every file of a result that is not as it was made.

    A file that was found right before and has its size and time of change still is not read again, unless
    `thorough`.
    """
    seen = {} if thorough else _remembered(folder)
    news = wrong = False
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            found = path.stat()
            if found.st_size != size:
                problem = f"{path} has {found.st_size} bytes of {size}"
            elif seen.get(name) == [size, found.st_mtime_ns]:
                continue
            else:
                problem = "" if file_digest(path) == digest else f"{path} is not the file that was made"
                news = True
        except FileNotFoundError:
            problem = f"{path} is missing"
        except OSError as error:
            problem = f"{path} cannot be read ({brief(error)})"
        if problem:
            wrong = True
            yield problem
    if news and not wrong:
        _remember(folder, files)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read a manifest, or return None where there is no whole one of any format."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def recorded_files(manifest: dict[str, Any]) -> Files | None:
    """Return what a manifest says of its files; None if it is of another format, or was damaged."""
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict):
        return None
    for name, entry in files.items():
        inside = not name.startswith("/") and ".." not in name.split("/")
        if not inside or not isinstance(entry, list) or [type(part) for part in entry] != [int, str]:
            return None
    return files


def verify_results(folder: str | Path) -> list[str]:
    """Hash every file of every finished result in and below a folder; return a sentence on each wrong one.

    Unfinished folders, which have no manifest, are no results. A result that somebody forged together
    with its manifest is not told from a true one.

    Raises
    ------
    PatchSAEError : there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PatchSAEError(f"There is no folder {folder}: give one that holds results.")
    problems = []
    for path in sorted(folder.rglob(MANIFEST)):
        problems += [f"{what}; delete {path.parent}, and it is made anew." for what in _verify(path.parent)]
    return problems


def _verify(folder: Path) -> Iterator[str]:
    manifest = read_manifest(folder)
    if manifest is None:
        yield f"{folder / MANIFEST} is damaged"
        return
    inputs = hashlib.sha256(canonical(manifest.get("inputs")).encode()).hexdigest()
    if inputs != manifest.get("digest") or not folder.name.endswith(f"-{inputs[:12]}"):
        yield f"{folder / MANIFEST} is not of the inputs that the folder is named by"
    elif (files := recorded_files(manifest)) is None:
        yield f"{folder / MANIFEST} holds no hashes, as those of older versions do not"
    else:
        yield from changed_files(folder, files, thorough=True)


def canonical(value: Any) -> str:
    """Write a JSON value the same in every process."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _remembered(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SEEN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(folder: Path, files: Files) -> None:
    temporary = folder / f".checked-{os.getpid()}"
    with contextlib.suppress(OSError):  # a folder that cannot be written to is hashed every time
        stamp = {name: [size, (folder / name).stat().st_mtime_ns] for name, (size, _) in files.items()}
        temporary.write_text(json.dumps(stamp), encoding="utf-8")
        os.replace(temporary, folder / SEEN)
