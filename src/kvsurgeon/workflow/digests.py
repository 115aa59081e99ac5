"""SHA-256 digests of files and tensors, read in chunks, and the comparison of models by them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kvsurgeon.errors import InputError
from kvsurgeon.io.external_data import weight_files
from kvsurgeon.io.progress import progress_bar
from kvsurgeon.io.staging import staged
from kvsurgeon.io.stored_weights import referred_to

_CHUNK = 16 * 2**20
_DATA = ("float_data", "int32_data", "int64_data", "uint64_data", "double_data", "string_data", "raw_data",
         "external_data", "data_location")  # fmt: skip


class FileDigests:
    """Digests of files, each of which is read once, whatever its names."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], str] = {}  # by file and time of its last change

    def of(self, path: Path) -> str:
        """Return the digest of a file.

        Raises:
            InputError: It is not there, is no regular file, or cannot be read.
        """
        try:
            if not path.is_file():
                raise InputError(f"expected a file at `{path}`, found none")
            status = path.stat()
            key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
            if key not in self._found:
                self._found[key] = _digest(path, status.st_size)
        except OSError as error:
            raise InputError(f"cannot read `{path}`: {error.strerror or error}") from error
        return self._found[key]


def _digest(path: Path, size: int) -> str:
    digest, done = hashlib.sha256(), 0
    with progress_bar(None) as on_progress, path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            on_progress(f"SHA-256 of {path.name}", done, size)
    return digest.hexdigest()


def model_files(model: ir.Model, path: Path) -> dict[str, Path]:
    """Return the file of a model and those of its external data, by name in its folder; the model is first.

    Raises:
        WeightsError: A file is missing.
    """
    return {path.name: path} | {file.location: file.path for file in weight_files(model)}


def different_part(first: ir.Model, second: ir.Model, digests: FileDigests) -> str | None:
    """Return what differs between two models: the name of a weight, or "the graph"; None if they are equal.

    Files of external data and their names do not count. Weights at one place of two files of one digest are not read.
    """
    if _graph(first) != _graph(second):
        return "the graph"
    others = second.graph.initializers
    for name, value in first.graph.initializers.items():
        tensor, other = value.const_value, others[name].const_value
        if tensor is not None and other is not None and not _is_same(tensor, other, digests):
            return f"`{name}`"
    return None


def _graph(model: ir.Model) -> bytes:
    """Return a model without the data of its initializers."""
    with referred_to(model), staged(model) as proto:
        for tensor in proto.graph.initializer:
            for field in _DATA:
                tensor.ClearField(field)
        found: bytes = proto.SerializeToString(deterministic=True)
    return found


def _is_same(first: ir.TensorProtocol, second: ir.TensorProtocol, digests: FileDigests) -> bool:
    if isinstance(first, ir.ExternalTensor) and isinstance(second, ir.ExternalTensor):
        files = [(digests.of(Path(one.path)), one.offset or 0) for one in (first, second)]
        if files[0] == files[1]:
            return True
    return _content(first) == _content(second)


class _Hash:
    """A file that keeps only the digest of what is written to it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def _content(tensor: Any) -> bytes:
    if tensor.dtype == ir.DataType.STRING:
        return repr(list(tensor.string_data())).encode()
    sink = _Hash()
    tensor.tofile(sink)
    return sink.digest.digest()
