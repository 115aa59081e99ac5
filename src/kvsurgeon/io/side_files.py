"""Take along what a model needs beside it: its data files, and the files that describe it and its tokenizer."""

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
from kvsurgeon.io.atomic_write import Draft
from kvsurgeon.io.external_data import WeightFile
from kvsurgeon.io.model_config import Change, followed
from kvsurgeon.io.progress import Report

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
_LARGEST_SIDE_FILE = 256 * 2**20  # bytes; no tokenizer is larger, and weights under such a name stay behind
_CHUNK = 64 * 2**20
CONFIG = "config.json"
CONFIGS = (CONFIG, "genai_config.json")  # that say how many heads there are


def carry_weights(files: Iterable[WeightFile], folder: Path, link_mode: LinkMode, draft: Draft, report: Report) -> None:
    """Have each data file in the folder too, under its location: the same file if it can be linked, else a copy.

    Raises:
        UsageError: Another file has the name already, or there is no room.
    """
    for file in files:
        target = folder / file.location
        if _is_there(file, target):
            continue
        draft.make_folder(target.parent)
        if link_mode == "copy" or not draft.link(file.path.resolve(), target):
            _copy(file, target, draft, report)


def carry_side_files(sources: Iterable[Path], folder: Path, draft: Draft, without: Collection[str] = ()) -> None:
    """Copy config, tokenizer and the like into the folder, files of earlier sources before those of later ones."""
    for name, file in _side_files(sources).items():
        if name not in without:
            with draft.new(folder / name) as copy, file.open("rb") as original:
                shutil.copyfileobj(original, copy)


def write_side_files(texts: Mapping[str, str], folder: Path, draft: Draft) -> None:
    """Write each text into the folder under its name."""
    for name, text in texts.items():
        with draft.new(folder / name) as file:
            file.write(text.encode("utf-8"))


def carry_config(
    sources: Iterable[Path], folder: Path, changes: Sequence[Change], draft: Draft, name: str = CONFIG
) -> None:
    """Write the config as it describes the model after these changes, where there is one that can be read."""
    here = next((source / name for source in sources if (source / name).is_file()), None)
    if here is None:
        return
    try:
        config = json.loads(here.read_text("utf-8"))
    except ValueError:
        return  # a file of that name that is no config
    if isinstance(config, dict) and (now := followed(config, changes, strict=name != CONFIG)) != config:
        write_side_files({name: json.dumps(now, indent=2, ensure_ascii=False) + "\n"}, folder, draft)


def _side_files(sources: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for source in sources:
        for pattern in SIDE_FILES:
            for file in sorted(source.glob(pattern)):
                if _is_side_file(file):
                    found.setdefault(file.name, file)
    return found


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


def _copy(file: WeightFile, target: Path, draft: Draft, report: Report) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < _occupied(file.path):
        raise UsageError(f"expected room for {file.bytes:,} bytes at `{target}`, found {free:,}; choose another folder")
    with draft.new(target) as copy, file.path.open("rb", buffering=0) as original:
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
