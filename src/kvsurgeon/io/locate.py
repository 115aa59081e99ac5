"""Find the model file that a path refers to, and parse it."""

from __future__ import annotations

import mmap
import stat
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from kvsurgeon.errors import InputError, InvalidModelError
from kvsurgeon.io.wire_format import without_weights

PROTOBUF_LIMIT = 2**31 - 1  # bytes; sizes within a protobuf message are signed 32-bit
PREFILL_FILE = "prefill.onnx"  # next to a model: computes the cache of a prompt alone
_LFS_POINTER = b"version https://git-lfs"
_PREFERRED = ("model.onnx", "onnx/model.onnx")
_LISTED = 8  # candidates named in a message


def find_model(path: str | Path) -> Path:
    """Return the `.onnx` file of a path: the path itself, or the model in that folder.

    Raises:
        InputError: There is no such file, or a folder has none or several.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"cannot read `{path}`: {error.strerror or error}") from error
    if not is_folder:
        raise InputError(f"expected an .onnx file or a folder with one, found nothing at `{path}`; check the path")
    for name in _PREFERRED:
        if (path / name).is_file():
            return path / name
    return _only_model(path)


def _only_model(folder: Path) -> Path:
    candidates = sorted(file for file in folder.glob("*.onnx") if file.is_file())
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError(f"expected an .onnx file in `{folder}`, found none; give the path of the file")
    named = ", ".join(file.name for file in candidates[:_LISTED])
    more = f" and {len(candidates) - _LISTED} more" if len(candidates) > _LISTED else ""
    raise InputError(
        f"expected `model.onnx` or a single .onnx file in `{folder}`, found {len(candidates)}: {named}{more}; "
        "give the path of one"
    )


def read_proto(path: Path, location: str | None = None) -> onnx.ModelProto:
    """Return the content of a model file, without external data.

    Args:
        path: The file.
        location: If given, large initializers refer to the file under this location.

    Raises:
        InputError: The file cannot be opened.
        InvalidModelError: The file is not an ONNX protobuf, or is truncated.
    """
    try:
        with path.open("rb") as file:
            status = path.stat()
            _check_file(path, status.st_mode, status.st_size)
            # Mapped, so that embedded weights are in memory once (in the proto) and not twice while parsing.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                shortened = None if location is None else _shortened(view, location)
                return parse(view if shortened is None else memoryview(shortened), f"`{path}`")
    except OSError as error:
        raise InputError(f"cannot read `{path}`: {error.strerror or error}") from error


def _check_file(path: Path, mode: int, size: int) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"expected a regular file, found another kind of file at `{path}`")
    if size == 0:
        raise InvalidModelError(f"expected an ONNX model, found an empty file at `{path}`; download or export it again")
    if size > PROTOBUF_LIMIT:
        raise InvalidModelError(
            f"`{path}` has {size:,} bytes, more than the 2 GiB of a protobuf file; "
            "save the model with its weights as external data"
        )


def _shortened(view: memoryview, location: str) -> bytes | None:
    try:
        return without_weights(view, location)
    except ValueError:
        return None  # damaged: parsing it gives the reason


def parse(view: memoryview, name: str) -> onnx.ModelProto:
    """Return the content of a model file.

    Args:
        view: The bytes of the file.
        name: Name of the model in messages.

    Raises:
        InvalidModelError: It is not an ONNX protobuf, or is truncated.
    """
    head = bytes(view[:256])
    if head.startswith(_LFS_POINTER):
        raise InvalidModelError(f"{name} is a git-lfs pointer, not the model; run `git lfs pull` in its repository")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(view)
    except DecodeError as error:
        raise InvalidModelError(f"{name} {_diagnosis(head)}") from error
    return proto


def _diagnosis(head: bytes) -> str:
    if head.startswith(b"\x08"):  # field 1, `ir_version`, which writers write first
        return "starts like an ONNX model, but is truncated or damaged; download or export it again"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "is a text file, not an ONNX model"
    return "is not an ONNX model"
