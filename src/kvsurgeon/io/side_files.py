"""Provide the files of a model in another folder: its data files, config and tokenizer."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from kvsurgeon.errors import InputError, UsageError
from kvsurgeon.io.atomic_write import FileTransaction
from kvsurgeon.io.data_file import check_space
from kvsurgeon.io.external_data import WeightFile
from kvsurgeon.io.json_files import LARGEST, read_json
from kvsurgeon.io.model_config import HeadChange, updated_config
from kvsurgeon.io.progress import OnProgress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SIDE_FILES = (
    "*config.json",  # config, generation_config, tokenizer_config, preprocessor_config, processor_config, ...
    "tokenizer*",
    "*vocab*",
    "*merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.model",  # sentencepiece
    "*.tiktoken",
    "*.jinja",
)
CONFIG = "config.json"
CONFIGS = (CONFIG, "genai_config.json")  # files with head counts
_CHUNK = 16 * 2**20
_COMPARED = 2**20
_FICLONE = 0x40049409  # ioctl of Linux: share the blocks of another file until one of the two is written to


@dataclass(frozen=True, kw_only=True)
class FileProvider:
    """Provides files of a model in another folder, and replaces none of different content without permission.

    Attributes:
        transaction: Writes the files.
        link: Whether to link data files instead of copying them.
        force: Whether to replace existing files of different content.
        kept: Files of the source, which are never replaced.
        on_progress: Called while a data file is copied.
    """

    transaction: FileTransaction
    link: bool
    force: bool
    kept: frozenset[Path]
    on_progress: OnProgress

    def provide_weights(self, files: Iterable[WeightFile], folder: Path) -> None:
        """Copy or link each data file into a folder, at its location; those that are there stay.

        Raises:
            UsageError: Another file has the name already, or the disk is full.
        """
        for file in files:
            target = folder / file.location
            if self._is_there(target, partial(_same_content, file.path)):
                continue
            self.transaction.make_folder(target.parent)
            if not (self.link and self.transaction.link(file.path.resolve(), target)):
                self._copy(file.path, target, partial(self.on_progress, file.location))

    def provide_texts(self, texts: Mapping[str, str], folder: Path) -> None:
        """Write texts to files of these names in a folder.

        Raises:
            UsageError: A file of other content has the name already.
        """
        for name, text in texts.items():
            content = text.encode("utf-8")
            if not self._is_there(folder / name, partial(_has_content, content)):
                with self.transaction.create(folder / name) as file:
                    file.write(content)

    def copy_side_files(self, files: Iterable[Path], folder: Path) -> None:
        """Copy files into a folder.

        Raises:
            UsageError: A file of other content has the name already.
        """
        for file in files:
            target = folder / file.name
            if not self._is_there(target, partial(_same_content, file)):
                self._copy(file, target, lambda _done, _total: None)

    def _is_there(self, target: Path, is_same: Callable[[Path], bool]) -> bool:
        """Whether the target exists with the content that it shall have.

        Raises:
            UsageError: It has another content, or is no file, and must not be replaced.
        """
        if not os.path.lexists(target):
            return False
        with suppress(OSError):
            if target.is_file() and is_same(target):
                return True
        if not self.force or target.is_dir() or target.resolve() in self.kept:
            raise UsageError(
                f"expected no file at `{target}`, or one of the same content, found another file; "
                "choose another folder, or replace it by --force, or force=True"
            )
        return False

    def _copy(self, source: Path, target: Path, on_progress: Callable[[int, int], None]) -> None:
        """Copy a file; without copying its blocks where the file system can share them."""
        status = source.stat()
        with self.transaction.create(target, synced=False) as copy, source.open("rb", buffering=0) as original:
            if _share_blocks(original, copy):
                self.transaction.record(target, "cloned")
                return
            self.transaction.record(target, "copied")
            check_space(target, min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512))
            _copy_extents(original, copy, status.st_size, on_progress)


def side_file_folders(folder: Path | None) -> tuple[Path, ...]:
    """Return where a model in a folder has its side files: there, or in the folder above for `onnx/model.onnx`."""
    if folder is None:
        return ()
    return (folder, folder.parent) if folder.name == "onnx" else (folder,)


def find_side_files(folders: Sequence[Path], model_file: Path | None) -> dict[str, Path]:
    """Return the side files of a model by name; earlier folders take precedence.

    Args:
        folders: Where the model has its side files.
        model_file: The file of the model. If it is a symlink, as in the cache of a model hub, side files can link into
            the folder of its target.

    Raises:
        InputError: A side file is a link to a file outside the folder, as an unpacked archive can contain.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        allowed = [folder.resolve(), *([model_file.resolve().parent] if model_file and model_file.is_symlink() else [])]
        for file in (file for pattern in SIDE_FILES for file in sorted(folder.glob(pattern))):
            if file.name.startswith(".") or not file.is_file() or file.stat().st_size > LARGEST:
                continue
            if not any(file.resolve().is_relative_to(one) for one in allowed):
                raise InputError(
                    f"expected side files in the folder of the model, found a link from `{file}` to "
                    f"`{file.resolve()}`; replace the link by the file itself"
                )
            found.setdefault(file.name, file)
    return found


def updated_configs(side_files: Mapping[str, Path], changes: Sequence[HeadChange]) -> Iterator[tuple[Path, str]]:
    """Yield each config whose head counts change, with its new content.

    Raises:
        InputError: A config cannot be read.
    """
    for path in (side_files[name] for name in CONFIGS if name in side_files):
        try:
            config = read_json(path)
        except ValueError:
            continue  # not a config
        if isinstance(config, dict):
            new = updated_config(config, changes, strict=path.name != CONFIG)
            if new != config:
                yield path, json.dumps(new, indent=2, ensure_ascii=False) + "\n"


def _has_content(content: bytes, file: Path) -> bool:
    return file.stat().st_size == len(content) and file.read_bytes() == content


def _same_content(first: Path, second: Path) -> bool:
    """Whether two files have the same bytes; their times say nothing."""
    if first.samefile(second):
        return True
    with first.open("rb") as one, second.open("rb") as other:
        if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
            return False
        blocks = iter(lambda: (one.read(_COMPARED), other.read(_COMPARED)), (b"", b""))
        return all(block == its for block, its in blocks)


def _share_blocks(original: FileIO, copy: BinaryIO) -> bool:
    """Make a copy that shares the blocks of the original; return False if the file system cannot do this."""
    with suppress(OSError):
        if fcntl is not None:
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
            return True
    return False


def _copy_extents(original: FileIO, copy: BinaryIO, size: int, on_progress: Callable[[int, int], None]) -> None:
    """Copy a file, and keep the holes of a sparse one."""
    done = 0
    while done < size:
        done = _next_data(original, done, size)
        original.seek(done)
        copy.seek(done)
        block = original.read(_CHUNK)
        copy.write(block)
        done += len(block)
        on_progress(done, size)
        if not block:
            break
    copy.truncate(size)


def _next_data(file: FileIO, offset: int, end: int) -> int:
    """Return where the next data begins, at or after an offset."""
    if not hasattr(os, "SEEK_DATA"):
        return offset
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else offset  # ENXIO: only a hole is left
