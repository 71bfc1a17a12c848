"""Bytes that are on the disk or are not: whole files, made to last, and one sentence where a disk fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from patchsae.runs.errors import PatchSAEError, brief

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO, errno.ESTALE)
# a file system that has no such thing: nothing can be done, and nothing was lost
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


def write_atomic(path: str | Path, write_fn: Callable[[Path], object]) -> Path:
    """Let `write_fn` write a temporary file beside `path`, then rename it onto `path`.

    When this returns, content and name outlast a loss of power.

    Raises
    ------
    PatchSAEError : the disk is full, fails, or may not be written to; the old file stays as it was.
    """
    path = Path(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix is kept because writers such as numpy and matplotlib choose the format by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    temporary = Path(name)
    try:
        with _writing(path):
            write_fn(temporary)
            # mkstemp makes the file private; a result is as readable as any other new file.
            temporary.chmod(0o666 & ~_umask())
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # of a disk that fails the first error says more
            temporary.unlink(missing_ok=True)
    return path


def remove(*left: Path) -> None:
    """Delete what a finished result was made from, after its manifest: a kill between must not start over.

    On a disk that fails, or may not be written to, it stays and does no harm.
    """
    for path in left:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    folder = path.is_dir()
    try:
        # Windows flushes only what may be written
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except OSError as error:
        if folder and error.errno in UNSUPPORTED:  # Windows opens no folder
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Turn any error of the system in the block into one sentence that names `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    # Writers in other languages (safetensors, papermill) wrap the system's error in their own.
    try:
        yield
    except PatchSAEError:
        raise
    except Exception as error:
        if _number(error) in (*FULL, *BROKEN):
            raise storage_error(path, error) from error
        raise


def storage_error(path: str | Path, error: Exception) -> PatchSAEError:
    """Return the sentence for a file or folder that could not be written."""
    if _number(error) in FULL:
        return PatchSAEError(
            f"The disk is full, so {path} was not written: free some space, then run again."
        )
    return PatchSAEError(
        f"Could not write {path} ({brief(error)}): check the folder, its disk and its permissions."
    )


def file_digest(path: Path) -> str:
    """Hash the content of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _number(error: Exception) -> int | None:
    """Return the system's number of an error, or of the one that another writer put into its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return next((number for number in (*FULL, *BROKEN) if os.strerror(number) in str(error)), None)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
