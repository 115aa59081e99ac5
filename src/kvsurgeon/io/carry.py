"""Take along what a model needs beside it: its data files, and the files that describe it and its tokenizer."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Literal

from kvsurgeon.errors import UsageError
from kvsurgeon.io.atomic import replacing
from kvsurgeon.io.progress import Report
from kvsurgeon.io.weights import WeightFile

Sharing = Literal["link", "copy"]

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
_LARGEST_SIDE_FILE = 256 * 2**20  # bytes; no tokenizer is larger, and weights under such a name stay behind
_CHUNK = 64 * 2**20


def carry_weights(files: Iterable[WeightFile], folder: Path, sharing: Sharing, report: Report) -> None:
    """Have each data file in the folder too, under its location: the same file if it can be linked, else a copy.

    Raises:
        UsageError: Another file has the name already, or there is no room.
    """
    for file in files:
        target = folder / file.location
        if _is_there(file, target):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if sharing == "copy" or not _linked(file.path, target):
            _copy(file, target, report)


def carry_side_files(sources: Iterable[Path], folder: Path, *, without: frozenset[str] = frozenset()) -> None:
    """Copy config, tokenizer and the like into the folder, files of earlier sources before those of later ones."""
    taken = set(without)
    for source in sources:
        for pattern in SIDE_FILES:
            for file in sorted(source.glob(pattern)):
                if file.name not in taken and _is_side_file(file):
                    taken.add(file.name)
                    with replacing(folder / file.name) as copy, file.open("rb") as original:
                        shutil.copyfileobj(original, copy)


def write_side_files(texts: Mapping[str, str], folder: Path) -> None:
    """Write each text into the folder under its name."""
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode("utf-8"))


def _is_side_file(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.stat().st_size <= _LARGEST_SIDE_FILE


def _is_there(file: WeightFile, target: Path) -> bool:
    """Return whether the target is this file, or a copy of it that an earlier save made.

    Raises:
        UsageError: It is another file.
    """
    if not os.path.lexists(target):
        return False
    if target.is_file():
        here, there = target.stat(), file.path.stat()
        if os.path.samestat(here, there):
            return True
        if (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns):
            return True
    raise UsageError(
        f"expected no file at `{target}`, or the weights of this model, found another file; "
        "choose another folder, or remove that file if nothing needs it"
    )


def _linked(source: Path, target: Path) -> bool:
    with suppress(OSError):  # another file system, or one without links
        os.link(source.resolve(), target)
        return True
    return False


def _copy(file: WeightFile, target: Path, report: Report) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < _occupied(file.path):
        raise UsageError(f"expected room for {file.bytes:,} bytes at `{target}`, found {free:,}; choose another folder")
    with replacing(target) as copy, file.path.open("rb", buffering=0) as original:
        _copy_extents(original, copy, file, report)
        status = os.fstat(original.fileno())
        copy.flush()
        os.utime(copy.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))  # by which `_is_there` knows it again


def _occupied(path: Path) -> int:
    status = path.stat()
    return min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)


def _copy_extents(original: FileIO, copy: BinaryIO, file: WeightFile, report: Report) -> None:
    """Copy what is there and leave holes as holes."""
    done = 0
    while done < file.bytes:
        done = _next_data(original, done, file.bytes)
        original.seek(done)
        copy.seek(done)
        block = original.read(_CHUNK)
        copy.write(block)
        done += len(block)
        report(file.location, done, file.bytes)
        if not block:
            break
    copy.truncate(file.bytes)


def _next_data(file: FileIO, offset: int, end: int) -> int:
    """Return where data begins at or after the offset."""
    if not hasattr(os, "SEEK_DATA"):
        return offset
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else offset  # ENXIO: nothing but a hole is left
