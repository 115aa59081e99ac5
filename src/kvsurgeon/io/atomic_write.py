"""Write files so that whoever looks sees the old ones or the new ones, whole, even if the writer is killed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvsurgeon.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: stale files stay, for want of a sound way to know that they are stale
    fcntl = None  # type: ignore[assignment]

_MARK = ".kvsurgeon-"
_DESCRIPTORS = "/proc/self/fd"  # where Linux shows a process its open files
_UNNAMED = getattr(os, "O_TMPFILE", 0) if os.path.isdir(_DESCRIPTORS) else 0


@dataclass(kw_only=True)
class _Pending:
    """A file that has not taken its name yet."""

    path: Path
    file: BinaryIO
    temporary: Path | None  # None: it has no name at all, and vanishes with its writer


class Draft:
    """Files that take their names together, in the order in which they were opened; or vanish together.

    Where the file system allows it, files have no name until then, so that a killed writer leaves nothing. Elsewhere
    they have hidden names, which `remove_stale` finds.
    """

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._links: list[tuple[Path, Path]] = []
        self._made: list[Path] = []

    def make_folder(self, folder: Path) -> None:
        """Make a folder, and those above it.

        Raises:
            UsageError: It cannot be made.
        """
        with _telling(folder):
            missing = [one for one in (folder, *folder.parents) if not one.exists()]
            for one in reversed(missing):
                one.mkdir(exist_ok=True)
                self._made.append(one)

    @contextmanager
    def new(self, path: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
        """Give a file to write to, which `publish` names `path`.

        Args:
            path: What it is called in the end.
            synced: Whether its bytes are on the disk when the block ends. If not, they are handed to the system, as
                `cp` does: should the machine stop in the next seconds, the file is too short, and loading says so.

        Raises:
            UsageError: The file cannot be written there.
        """
        with _telling(path):
            pending = _opened(path)
            self._pending.append(pending)
            yield pending.file
            pending.file.flush()
            if synced:
                os.fsync(pending.file.fileno())
            else:
                os.close(os.dup(pending.file.fileno()))  # network file systems say only then that a write failed

    def link(self, source: Path, path: Path) -> bool:
        """Return whether `source` can have the further name `path`, which `publish` then gives to it."""
        trial = _hidden(path)
        with suppress(OSError):  # another file system, or one without links
            os.link(source, trial)
            trial.unlink()
            self._links.append((source, path))
            return True
        return False

    def publish(self) -> None:
        """Give all files their names: nothing but renaming, so that there is hardly a moment between first and last.

        Raises:
            UsageError: A file cannot take its name; then none has taken one that was free before.
        """
        fresh: list[Path] = []
        try:
            for source, path in self._links:
                with _telling(path):
                    os.link(source, path)
                fresh.append(path)
            for pending in self._pending:
                is_fresh = not os.path.lexists(pending.path)
                with _telling(pending.path):
                    _name(pending)
                fresh += [pending.path] if is_fresh else []
        except BaseException:
            for path in fresh:
                path.unlink(missing_ok=True)
            raise
        for folder in {path.parent for path in (*fresh, *(pending.path for pending in self._pending))}:
            _sync_folder(folder)
        self._made.clear()

    def close(self) -> None:
        """Let go of all that was not published, and of the locks on what was."""
        for pending in self._pending:
            with suppress(OSError):  # what is buffered goes nowhere
                pending.file.close()
            if pending.temporary is not None:
                pending.temporary.unlink(missing_ok=True)
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def drafting() -> Iterator[Draft]:
    """Give a draft, which is published when the block ends well and vanishes when it does not.

    Raises:
        UsageError: A file cannot be written.
    """
    draft = Draft()
    try:
        yield draft
        draft.publish()
    finally:
        draft.close()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which becomes `path` when the block ends well and vanishes when it does not.

    Raises:
        UsageError: The file cannot be written there.
    """
    with drafting() as draft, draft.new(path) as file:
        yield file


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


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Say of a file that cannot be written which one it is."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror or error}") from error


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name}{_MARK}{secrets.token_hex(4)}"


def _opened(path: Path) -> _Pending:
    """Create a file without a name in the folder of `path`; where that cannot be, a locked one of a hidden name."""
    with suppress(OSError):
        if _UNNAMED and _can_be_named_later(path):
            return _Pending(path=path, file=_open_unnamed(path.parent), temporary=None)
    temporary, file = _open_locked(path)
    return _Pending(path=path, file=file, temporary=temporary)


def _open_unnamed(folder: Path) -> BinaryIO:
    return os.fdopen(os.open(folder, _UNNAMED | os.O_WRONLY, 0o666), "wb")


def _can_be_named_later(path: Path) -> bool:
    """Try it with an empty file: gigabytes would be lost if it turned out only at the end that names are not given."""
    trial = _hidden(path)
    with _open_unnamed(path.parent) as file:
        _name_open_file(file, trial)
        trial.unlink()
    return True


def _open_locked(path: Path) -> tuple[Path, BinaryIO]:
    """Create a file of a new name beside `path`, locked for as long as it is open."""
    while True:
        temporary = _hidden(path)
        file = temporary.open("xb")
        if fcntl is None:
            return temporary, file
        # Between opening and locking, another process may take the file for stale and remove it: then try again.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return temporary, file
        file.close()


def _name(pending: _Pending) -> None:
    """Let the file be what its path names, in one step for whoever looks."""
    if pending.temporary is None:
        with suppress(FileExistsError):
            _name_open_file(pending.file, pending.path)
            return
        pending.temporary = _hidden(pending.path)
        if fcntl is not None:
            fcntl.flock(pending.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _name_open_file(pending.file, pending.temporary)
    _keep_mode(pending.temporary, pending.path)
    if fcntl is None:
        pending.file.close()  # Windows renames closed files only; elsewhere the lock is held until the end
    os.replace(pending.temporary, pending.path)


def _name_open_file(file: BinaryIO, path: Path) -> None:
    descriptors = os.open(_DESCRIPTORS, os.O_RDONLY)
    try:  # only with a folder to start from does Python ask the system to follow the link to the open file
        os.link(str(file.fileno()), path, src_dir_fd=descriptors)
    finally:
        os.close(descriptors)


def _keep_mode(temporary: Path, path: Path) -> None:
    with suppress(OSError):
        temporary.chmod(path.stat().st_mode & 0o777)


def _sync_folder(folder: Path) -> None:
    """Make the new names last through a crash of the system, where folders can be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
