"""Copy or link the files of a model into another folder: its data files, config and tokenizer."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Literal

from kvsurgeon.errors import UsageError
from kvsurgeon.io.atomic_write import FileTransaction
from kvsurgeon.io.data_file import check_space
from kvsurgeon.io.external_data import WeightFile
from kvsurgeon.io.json_files import LARGEST, read_json
from kvsurgeon.io.model_config import HeadChange, updated_config
from kvsurgeon.io.progress import OnProgress

LinkMode = Literal["link", "copy"]

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
_CHUNK = 64 * 2**20
CONFIG = "config.json"
CONFIGS = (CONFIG, "genai_config.json")  # files with head counts


def provide_weights(
    files: Iterable[WeightFile],
    folder: Path,
    link_mode: LinkMode,
    transaction: FileTransaction,
    on_progress: OnProgress,
) -> None:
    """Link or copy each data file into a folder, at its location.

    Raises:
        UsageError: Another file has the name already, or the disk is full.
    """
    for file in files:
        target = folder / file.location
        if _exists(file, target):
            continue
        transaction.make_folder(target.parent)
        if link_mode == "copy" or not transaction.link(file.path.resolve(), target):
            _copy(file, target, transaction, on_progress)


def copy_side_files(
    sources: Iterable[Path], folder: Path, transaction: FileTransaction, without: Collection[str] = ()
) -> None:
    """Copy config, tokenizer and similar files into a folder; earlier sources take precedence."""
    for name, file in _side_files(sources).items():
        if name not in without:
            with transaction.create(folder / name) as copy, file.open("rb") as original:
                shutil.copyfileobj(original, copy)


def write_side_files(texts: Mapping[str, str], folder: Path, transaction: FileTransaction) -> None:
    """Write texts to files of these names in a folder."""
    for name, text in texts.items():
        with transaction.create(folder / name) as file:
            file.write(text.encode("utf-8"))


def update_config(
    sources: Iterable[Path],
    folder: Path,
    changes: Sequence[HeadChange],
    transaction: FileTransaction,
    name: str = CONFIG,
) -> None:
    """Write the config with updated head counts, if there is one and it changes."""
    path = next((source / name for source in sources if (source / name).is_file()), None)
    if path is None:
        return
    try:
        config = read_json(path)
    except ValueError:
        return  # not a config
    if isinstance(config, dict) and (new := updated_config(config, changes, strict=name != CONFIG)) != config:
        write_side_files({name: json.dumps(new, indent=2, ensure_ascii=False) + "\n"}, folder, transaction)


def _side_files(sources: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for source in sources:
        for pattern in SIDE_FILES:
            for file in sorted(source.glob(pattern)):
                if file.is_file() and not file.name.startswith(".") and file.stat().st_size <= LARGEST:
                    found.setdefault(file.name, file)
    return found


def _exists(file: WeightFile, target: Path) -> bool:
    """Return whether the target is this data file, or a copy of it by an earlier save.

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
        "choose another folder, or remove the file if it is not needed"
    )


def _copy(file: WeightFile, target: Path, transaction: FileTransaction, on_progress: OnProgress) -> None:
    status = file.path.stat()
    check_space(target, min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512))
    with transaction.create(target) as copy, file.path.open("rb", buffering=0) as original:
        _copy_extents(original, copy, file, on_progress)
        status = os.fstat(original.fileno())
        copy.flush()
        os.utime(copy.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))  # by which `_exists` recognizes it


def _copy_extents(original: FileIO, copy: BinaryIO, file: WeightFile, on_progress: OnProgress) -> None:
    """Copy a file, and keep the holes of a sparse one."""
    done = 0
    while done < file.bytes:
        done = _next_data(original, done, file.bytes)
        original.seek(done)
        copy.seek(done)
        block = original.read(_CHUNK)
        copy.write(block)
        done += len(block)
        on_progress(file.location, done, file.bytes)
        if not block:
            break
    copy.truncate(file.bytes)


def _next_data(file: FileIO, offset: int, end: int) -> int:
    """Return where the next data begins, at or after an offset."""
    if not hasattr(os, "SEEK_DATA"):
        return offset
    try:
        return os.lseek(file.fileno(), offset, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else offset  # ENXIO: only a hole is left
