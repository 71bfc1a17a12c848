"""Where results live: one folder per stage, named by the hash of what went into it.

The manifest is written last and by atomic rename, so a folder with a manifest is complete and a
folder without one is unfinished, whatever stopped the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from patchsae.runs.disk import file_digest, storage_error, storing, write_atomic
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.verify import (
    FORMAT,
    MANIFEST,
    canonical,
    changed_files,
    read_manifest,
    record_files,
    recorded_files,
)

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

PARTIAL = (
    ".*-*",
    ".tmp*",
)  # what a killed process leaves: as `write_atomic` names it, and as safetensors does


def project_root() -> Path:
    """Return the project folder, whatever the current directory is."""
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            project = folder / "pyproject.toml"
            if project.is_file() and 'name = "patchsae"' in project.read_text(encoding="utf-8"):
                return folder
    raise PatchSAEError(
        f"No patchsae project above {Path.cwd()}: run from inside a clone of the repository."
    )


def write_json(path: str | Path, value: Any) -> Path:
    """Write a JSON-able value as readable text, atomically."""
    text = json.dumps(jsonable(value), indent=1, sort_keys=True) + "\n"
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def jsonable(value: Any) -> Any:
    """Turn dataclasses, paths, tuples and numpy scalars into plain JSON values.

    A path of a file becomes the hash of its content; any other path becomes its text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(item) for item in value), key=json.dumps)
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return f"sha256:{file_digest(value)}" if value.is_file() else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no NaN and no infinity; their names survive a round trip.
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    raise PatchSAEError(
        f"A value of type {type(value).__name__} cannot be recorded in a manifest: "
        "give numbers, strings, lists, mappings, dataclasses or file paths."
    )


def digest(inputs: Any) -> str:
    """Hash a JSON-able value; equal values hash equally in every process."""
    return hashlib.sha256(canonical(jsonable(inputs)).encode()).hexdigest()


def versioned(inputs: Mapping[str, Any] | Any, version: int) -> dict[str, Any]:
    """Return what names a result: its inputs, and the version of the code that makes it."""
    recorded = jsonable(inputs)
    if "version" in recorded:
        raise PatchSAEError("'version' among the inputs is the code's own; give it another name.")
    return recorded | {"version": version}


def tree_digests(root: Path, *patterns: str) -> dict[str, str]:
    """Hash every file under `root` that matches a glob pattern, by its relative path."""
    return {path.relative_to(root).as_posix(): file_digest(path) for path in _files(root, patterns)}


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the packages that shape results."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    try:
        requirements = metadata.requires("patchsae") or []
    except metadata.PackageNotFoundError:
        raise PatchSAEError(
            "The package patchsae is not installed: run `make book`, or `pip install -e .` here."
        ) from None
    for requirement in requirements:
        name, _, extra = re.match(r"([\w.-]+)([^;]*);?(.*)", requirement).groups()
        # Tools around the runs do not shape results.
        if re.search("test|bench|cluster", extra):
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Describe the machine in words: processor, cores, memory, system."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"
    except (OSError, StopIteration, ValueError, AttributeError):  # not Linux
        return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def git_commit() -> str | None:
    """Return the commit checked out, with '-dirty' if files were changed, or None outside a clone."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        asked = subprocess.run(command, cwd=project_root(), capture_output=True, text=True)
    except (OSError, PatchSAEError):
        return None
    return asked.stdout.strip() or None


class Together(Protocol):
    """What a stage asks of the processes that work together (`processes.Processes`)."""

    @property
    def first(self) -> bool: ...
    def agree(self, flag: bool) -> bool: ...
    def wait(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Stage:
    """One result folder and the inputs that name it."""

    path: Path
    name: str
    inputs: dict[str, Any]
    started: float

    @classmethod
    def open(cls, root: str | Path, name: str, inputs: Mapping[str, Any] | Any, *, version: int) -> Stage:
        """Make (or find again) the folder `root/name-<hash12>` for these inputs and this code.

        `version` belongs to the code that makes the result: it is raised whenever the same inputs would
        give other numbers, so that nothing made by the old code is taken for the new code's.
        """
        recorded = versioned(inputs, version)
        path = Path(root) / f"{name}-{digest(recorded)[:12]}"
        if not path.is_dir():  # a finished one may lie where nothing can be written
            with storing(path):
                path.mkdir(parents=True, exist_ok=True)
        return cls(path, name, recorded, time.time())

    @property
    def done(self) -> bool:
        """Tell whether the folder holds a finished result of exactly these inputs."""
        manifest = self.manifest
        ours = manifest is not None and manifest.get("inputs") == self.inputs
        return ours and recorded_files(manifest) is not None

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Read the manifest, or return None where there is no whole one."""
        return read_manifest(self.path)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process works in this folder, and remove what killed ones left half-written.

        The system takes the lock from a process that is killed, so it cannot be left behind.
        """
        try:
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise storage_error(self.path, error) from error
        with lock:
            # Some network file systems have no locks: nobody waits then, and nothing is removed.
            with contextlib.suppress(OSError, AttributeError):
                fcntl.flock(lock, fcntl.LOCK_EX)
                for pattern in PARTIAL:
                    for partial in self.path.glob(pattern):
                        partial.unlink()
            yield

    def once(self, make: Callable[[], object], processes: Together | None = None) -> Path:
        """Call `make`, which ends in `finish`, unless the result is here; return the folder.

        Of several processes on this machine one makes it and the others wait. Those of one torchrun
        (`processes`) make it together.

        Raises
        ------
        PatchSAEError : a finished result has lost a file, or a part of one, as an incomplete copy has.
        """
        agree = processes.agree if processes else bool
        if not agree(self.done):
            with self.alone() if processes is None or processes.first else contextlib.nullcontext():
                if not agree(self.done):  # another process may have finished it meanwhile
                    self._tell_of_old()
                    make()
                if processes:
                    processes.wait()
        self.check()
        return self.path

    def check(self) -> None:
        """Refuse a finished result of which a file is missing, or is not the one that was made.

        Quick: only files that were changed, or copied here, since they were last found right are read.

        Raises
        ------
        PatchSAEError : names the file.
        """
        files = recorded_files(self.manifest or {})
        if files is None:
            raise PatchSAEError(f"{self.path} was not finished: run again.")
        if problem := next(changed_files(self.path, files), None):
            raise PatchSAEError(
                f"{problem}: copy the whole folder again, or delete {self.path}, and it is made anew."
            )

    def _tell_of_old(self) -> None:
        if (self.manifest or {}).get("inputs") == self.inputs:
            warnings.warn(
                f"{self.path} was finished by an older version, which kept no hashes of its files, so it "
                "is made anew.",
                stacklevel=4,
            )

    def finish(self, *results: str, seed: int | None = None, **facts: Any) -> Path:
        """Write the manifest, which makes the folder a finished result.

        `results` are patterns of files and folders here: all that outlasts this run. They are made to last
        before the manifest is, which keeps size and hash of every file.

        Raises
        ------
        PatchSAEError : nothing matches a pattern; as `write_atomic`.
        """
        with storing(self.path):
            files = record_files(self.path, results)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "inputs": self.inputs,
            "digest": digest(self.inputs),
            "versions": versions(),
            "platform": f"{sys.platform} {platform.machine()}",
            "commit": git_commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.time() - self.started, 3),
        }
        if seed is not None:
            manifest["seed"] = seed
        manifest["files"] = files
        if facts:
            manifest["facts"] = facts
        return write_json(self.path / MANIFEST, manifest)


def _files(root: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return iter(sorted(path for path in found if "__pycache__" not in path.parts))
