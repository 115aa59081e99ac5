"""Write files atomically: readers find the old files or the new ones, complete, even if the writer is killed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from kvsurgeon.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: stale files stay, as they cannot be recognized
    fcntl = None  # type: ignore[assignment]

_MARK = ".kvsurgeon-"
_NAME_PART = 200  # bytes of a name in a hidden one; file systems allow 255
_DESCRIPTORS = "/proc/self/fd"  # the open files of a process on Linux
_UNNAMED = getattr(os, "O_TMPFILE", 0) if os.path.isdir(_DESCRIPTORS) else 0


Action = Literal["written", "copied", "cloned", "linked"]


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file that was written.

    Attributes:
        path: Its path.
        action: Whether it is new content, a copy of a file of the source, one that shares its blocks, or a link to it.
    """

    path: Path
    action: Action


class FileTransaction:
    """Files that get their names together, in the order in which they were created; or are removed together.

    On Linux a file has no name until then, so a killed writer leaves nothing. On other systems, and on file systems
    that cannot do this, it has a hidden name, which `remove_stale` finds.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}  # by final path
        self._temporary: dict[Path, Path] = {}  # hidden name by final path, for files that have one
        self._links: list[tuple[Path, Path]] = []
        self._actions: dict[Path, Action] = {}
        self._created_folders: list[Path] = []

    def make_folder(self, folder: Path) -> None:
        """Create a folder with its parents.

        Raises:
            UsageError: It cannot be created.
        """
        with _errors_of(folder):
            missing = [one for one in (folder, *folder.parents) if not one.exists()]
            for one in reversed(missing):
                one.mkdir(exist_ok=True)
                self._created_folders.append(one)

    @property
    def written(self) -> tuple[WrittenFile, ...]:
        """The files of the transaction that have their names."""
        return tuple(WrittenFile(path=path, action=action) for path, action in self._actions.items() if path.exists())

    @contextmanager
    def create(self, path: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
        """Create a file, which gets its name at `commit`.

        Args:
            path: The final path.
            synced: Whether to flush the file to disk at the end of the block. If not, the operating system writes it
                later, as with `cp`; if the machine crashes before, the file is too short, and loading reports that.

        Raises:
            UsageError: The file cannot be written.
        """
        with _errors_of(path):
            file = self._open(path)
            self._actions[path] = "written"
            yield file
            file.flush()
            if synced:
                os.fsync(file.fileno())
            else:
                os.close(os.dup(file.fileno()))  # network file systems report failed writes only here

    def record(self, path: Path, action: Action) -> None:
        """Record how the content of a created file is made."""
        self._actions[path] = action

    def link(self, source: Path, path: Path) -> bool:
        """Hard link a file under another name at `commit`; return False if the file system cannot do this."""
        trial = _hidden_name(path)
        with suppress(OSError):  # another file system, or one without links
            os.link(source, trial)
            trial.unlink()
            self._links.append((source, path))
            self._actions[path] = "linked"
            return True
        return False

    def commit(self) -> None:
        """Give all files their names. Only renames happen here, so there is hardly a moment between first and last.

        Raises:
            UsageError: A file cannot get its name; then no new name exists.
        """
        new: list[Path] = []
        try:
            for source, path in self._links:
                is_new = not os.path.lexists(path)
                with _errors_of(path):
                    _link_over(source, path)
                new += [path] if is_new else []
            for path in self._files:
                is_new = not os.path.lexists(path)
                with _errors_of(path):
                    self._rename(path)
                new += [path] if is_new else []
        except BaseException:
            for path in new:
                path.unlink(missing_ok=True)
            raise
        for folder in {path.parent for path in (*new, *self._files)}:
            _sync_folder(folder)
        self._created_folders.clear()

    def close(self) -> None:
        """Remove files and folders that were not committed, and release the locks on the others."""
        for path in list(self._files):
            self._discard(path)
        for folder in reversed(self._created_folders):
            with suppress(OSError):
                folder.rmdir()

    def _open(self, path: Path) -> BinaryIO:
        """Create a file without a name in the folder of `path`, or else a locked one of a hidden name."""
        if path in self._actions:
            raise UsageError(f"expected files of different names, found two called `{path}`; choose another name")
        with suppress(OSError):
            if _UNNAMED and _can_be_named_later(path):
                return self._files.setdefault(path, _open_unnamed(path.parent))
        self._temporary[path], self._files[path] = _open_locked(path)
        return self._files[path]

    def _discard(self, path: Path) -> None:
        """Close a file, and remove its hidden name if it has not got its final one."""
        with suppress(OSError):  # buffered bytes are lost, as intended
            self._files.pop(path).close()
        if path in self._temporary:
            self._temporary.pop(path).unlink(missing_ok=True)

    def _rename(self, path: Path) -> None:
        """Give a file its final name, in one step for readers."""
        file = self._files[path]
        if path not in self._temporary:
            with suppress(FileExistsError):
                _link_open_file(file, path)
                return
            temporary = _hidden_name(path)
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _link_open_file(file, temporary)
            self._temporary[path] = temporary
        with suppress(OSError):
            self._temporary[path].chmod(path.stat().st_mode & 0o777)
        if fcntl is None:
            file.close()  # Windows renames closed files only; other systems keep the lock until the end
        os.replace(self._temporary[path], path)


@contextmanager
def file_transaction() -> Iterator[FileTransaction]:
    """Commit a transaction at the end of the block, or remove its files if the block raises.

    Raises:
        UsageError: A file cannot be written.
    """
    transaction = FileTransaction()
    try:
        yield transaction
        transaction.commit()
    finally:
        transaction.close()


def check_new_file(path: Path, *suffixes: str) -> None:
    """Check, before anything is computed, that a file can be written and is not a model or the like.

    Raises:
        UsageError: It has none of the suffixes, or its folder does not exist or is not writable.
    """
    if path.suffix not in suffixes:
        raise UsageError(f"expected a file with the suffix {' or '.join(suffixes)}, found `{path}`")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise UsageError(f"cannot write `{path}`: expected a folder that is writable, and no folder of this name")


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, which replaces `path` at the end of the block, or is removed if the block raises.

    Raises:
        UsageError: The file cannot be written.
    """
    with file_transaction() as transaction, transaction.create(path) as file:
        yield file


def remove_stale(folder: Path) -> None:
    """Remove the hidden files that killed writers left in a folder.

    A writer holds a lock on its file, which the system releases when the writer dies: a file that can be locked has no
    writer. Files that cannot be locked, opened or removed stay.
    """
    if fcntl is None:
        return
    for leftover in folder.glob(f".*{_MARK}*"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Raise system errors in the block as errors that name the file."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror or error}") from error


def _link_over(source: Path, path: Path) -> None:
    """Hard link a file under another name, which may be in use."""
    try:
        os.link(source, path)
    except FileExistsError:
        temporary = _hidden_name(path)
        os.link(source, temporary)
        os.replace(temporary, path)


def _hidden_name(path: Path) -> Path:
    name = path.name.encode()[:_NAME_PART].decode(errors="ignore")
    return path.parent / f".{name}{_MARK}{secrets.token_hex(4)}"


def _open_unnamed(folder: Path) -> BinaryIO:
    return os.fdopen(os.open(folder, _UNNAMED | os.O_WRONLY, 0o666), "wb")


def _can_be_named_later(path: Path) -> bool:
    """Try with an empty file whether an unnamed file can get a name, before gigabytes are written to one."""
    trial = _hidden_name(path)
    with _open_unnamed(path.parent) as file:
        _link_open_file(file, trial)
        trial.unlink()
    return True


def _open_locked(path: Path) -> tuple[Path, BinaryIO]:
    """Create a file of a new hidden name in the folder of `path`, locked as long as it is open."""
    while True:
        temporary = _hidden_name(path)
        file = temporary.open("xb")
        if fcntl is None:
            return temporary, file
        # Between opening and locking, another process may consider the file stale and remove it: then try again.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return temporary, file
        file.close()


def _link_open_file(file: BinaryIO, path: Path) -> None:
    descriptors = os.open(_DESCRIPTORS, os.O_RDONLY)
    try:  # Python makes the system follow the link to the open file only if a start folder is given
        os.link(str(file.fileno()), path, src_dir_fd=descriptors)
    finally:
        os.close(descriptors)


def _sync_folder(folder: Path) -> None:
    """Make new names survive a crash of the system, if folders can be synced."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
