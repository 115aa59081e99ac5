"""Weights that stay in the model file: tensors that read it when they are used."""

from __future__ import annotations

import os
import secrets
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import InvalidModelError, WeightsError
from kvsurgeon.io.data_file import refer_to, references_to
from kvsurgeon.io.tensors import size_in_bytes

LARGE = 64 * 2**20  # bytes of a file whose weights are not read
_CHUNK = 1 << 24


class WeightsInFile:
    """The model file of weights that stay in it, open as long as one of them lives.

    Attributes:
        path: Its path, which may be that of another file later.
        location: Location of references to it in the proto of the model, which no other tensor has.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.location = f"kvsurgeon:{secrets.token_hex(8)}"
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    @classmethod
    def of(cls, path: Path) -> WeightsInFile | None:
        """Return the file if it is so large that its weights are not read."""
        status = path.stat()
        return cls(path) if stat.S_ISREG(status.st_mode) and status.st_size >= LARGE else None

    def open(self) -> BinaryIO:
        """Return the file, open for reading."""
        return open(os.dup(self._descriptor), "rb")

    def bind(self, model: ir.Model) -> None:
        """Replace references to the file by tensors that read it.

        Raises:
            InvalidModelError: Dims, type and data of a tensor do not fit together.
        """
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == self.location:
                expected = size_in_bytes(tensor.size, tensor.dtype)
                if tensor.length != expected:
                    raise InvalidModelError(
                        f"expected {expected} bytes for {tensor.dtype.name}{tensor.shape}, found {tensor.length} - at "
                        f"`{tensor.name}`; the file is damaged, export it again"
                    )
                value.const_value = StoredTensor(self, tensor)

    def is_in(self, folder: Path) -> bool:
        """Whether the file is in a folder, under its first name."""
        try:
            return self.path.parent == folder.resolve() and os.path.samestat(
                self.path.stat(), os.fstat(self._descriptor)
            )
        except OSError:
            return False


class _Elements:
    """The elements of a stored tensor, for numpy."""

    def __init__(self, stored: WeightsInFile, reference: ir.ExternalTensor) -> None:
        self.stored = stored
        self.dtype = reference.dtype.numpy()
        self.shape = tuple(reference.shape.numpy())
        self.offset = reference.offset or 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self.stored.open() as file:
            array = np.memmap(file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)
        return array if dtype is None else array.astype(dtype)


class StoredTensor(ir.Tensor[_Elements]):
    """A tensor in the model file."""

    def __init__(self, stored: WeightsInFile, reference: ir.ExternalTensor) -> None:
        self.stored = stored
        self.offset = reference.offset or 0
        super().__init__(
            _Elements(stored, reference), dtype=reference.dtype, shape=reference.shape, name=reference.name,
            doc_string=reference.doc_string, metadata_props=dict(reference.metadata_props) or None,
        )  # fmt: skip

    def __repr__(self) -> str:
        """Describe the tensor without reading it."""
        return f"{type(self).__name__}<{self.dtype},{self.shape}>(name={self.name!r})"

    def tofile(self, file: Any) -> None:
        """Write the elements, with one chunk of them in memory."""
        left = self.nbytes
        with self.stored.open() as source:
            source.seek(self.offset)
            while left:
                chunk = source.read(min(_CHUNK, left))
                if not chunk:
                    raise WeightsError(
                        f"expected {left:,} more bytes in `{self.stored.path}` for `{self.name}`, found none"
                    )
                file.write(chunk)
                left -= len(chunk)


def stored_tensors(model: ir.Model) -> dict[str, StoredTensor]:
    """Return the initializers of a model that are in a model file, by name."""
    initializers = model.graph.initializers.items()
    return {name: value.const_value for name, value in initializers if isinstance(value.const_value, StoredTensor)}


@contextmanager
def referred_to(model: ir.Model, folder: Path | None = None) -> Iterator[None]:
    """Make initializers that are in a model file refer to it in the block.

    Args:
        model: The model.
        folder: The folder that locations are relative to; weights of a file elsewhere stay as they are. If None,
            references serve as placeholders.
    """
    found = stored_tensors(model)
    if folder is not None:
        files = {id(one.stored): one.stored for one in found.values()}
        inside = {key for key, stored in files.items() if stored.is_in(folder)}
        found = {name: one for name, one in found.items() if id(one.stored) in inside}
    references = [
        refer_to(one, one.stored.location if folder is None else one.stored.path.name, one.offset)
        for one in found.values()
    ]
    with references_to([model.graph.initializers[name] for name in found], references):
        yield
