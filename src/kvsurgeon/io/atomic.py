"""Write a file so that whoever looks sees the old one or the new one, whole, even if the writer is killed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kvsurgeon.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: stale files stay, for want of a sound way to know that they are stale
    fcntl = None  # type: ignore[assignment]

_MARK = ".kvsurgeon-"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which becomes `path` when the block ends well and vanishes when it does not.

    Raises:
        UsageError: The file cannot be written there.
    """
    try:
        temporary, file = _open_locked(path)
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror or error}") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _keep_mode(temporary, path)
            if fcntl is None:
                file.close()  # Windows renames closed files only; elsewhere the lock is held until the end
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Remove what killed writers left in the folder.

    A writer holds a lock on its file, and the system drops the lock when the writer dies: a file that can be locked
    has no writer. Files that cannot be locked, opened or removed are left alone.
    """
    if fcntl is None:
        return
    for leftover in folder.glob(f".*{_MARK}*"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _open_locked(path: Path) -> tuple[Path, BinaryIO]:
    """Create a file of a new name beside `path`, locked for as long as it is open."""
    while True:
        temporary = path.parent / f".{path.name}{_MARK}{secrets.token_hex(4)}"
        file = temporary.open("xb")
        if fcntl is None:
            return temporary, file
        # Between opening and locking, another process may take the file for stale and remove it: then try again.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return temporary, file
        file.close()


def _keep_mode(temporary: Path, path: Path) -> None:
    with suppress(OSError):
        temporary.chmod(path.stat().st_mode & 0o777)


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a crash of the system, where folders can be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
