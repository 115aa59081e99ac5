"""Where a model's weights lie, and whether they can be there: looked up in the file system, never read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeGuard

import onnx_ir as ir

from kvsurgeon.errors import WeightsError
from kvsurgeon.io.tensors import size_in_bytes


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of external data that a model refers to."""

    path: Path
    location: str  # as the model spells it: relative to the model's folder
    bytes: int  # of the whole file


class ContainedTensor(ir.ExternalTensor):
    """An external tensor that `check_weights` answers for.

    onnx-ir would check on every read again, and refuse two things that are sound here: a data file with several
    hard links, which is how `save` shares weights between folders, and the symlinked snapshots of a model hub.
    """

    __slots__ = ()

    def _check_path_containment(self) -> None:
        """Leave quietly: where the file lies was checked when the model was loaded."""


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield every tensor of the model whose data lies in another file."""
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                yield from filter(_is_external, _carried(attribute))


def _carried(attribute: ir.Attr) -> Sequence[object]:
    if attribute.type == ir.AttributeType.TENSOR:
        return (attribute.value,)  # `as_tensor` checks a protocol each time, which takes longer than loading
    return attribute.value or () if attribute.type == ir.AttributeType.TENSORS else ()


def _is_external(tensor: object) -> TypeGuard[ir.ExternalTensor]:
    return isinstance(tensor, ir.ExternalTensor)


def weight_files(model: ir.Model) -> tuple[WeightFile, ...]:
    """Return the files that the model's external data lies in, in the order in which the model names them.

    Raises:
        WeightsError: A file is missing.
    """
    return files_of(external_tensors(model))


def files_of(tensors: Iterable[ir.ExternalTensor]) -> tuple[WeightFile, ...]:
    """Return the files that these tensors lie in, each once.

    Raises:
        WeightsError: A file is missing.
    """
    first = {str(tensor.location): tensor for tensor in tensors}
    return tuple(
        WeightFile(path=Path(tensor.path), location=location, bytes=_size(Path(tensor.path), tensor))
        for location, tensor in first.items()
    )


def check_weights(model: ir.Model, *, model_file: Path | None = None) -> None:
    """Leave quietly if each external tensor lies whole in a file of the model's own folder.

    Args:
        model: A model whose external tensors know their folder.
        model_file: The file that the model was read from. If it is a symlink, as in the cache of a model hub, its
            data may also lie beside the file that it points to.

    Raises:
        WeightsError: A file is missing, too short, or outside the folder; or a length is not that of the tensor.
    """
    sizes: dict[str, int] = {}  # one look at each file, however many tensors it holds
    for tensor in external_tensors(model):
        location = str(tensor.location)
        if location not in sizes:
            _check_contained(tensor, model_file)
            sizes[location] = _size(Path(tensor.path), tensor)
        _check_extent(tensor, sizes[location])


def is_relative_location(location: str) -> bool:
    """Return whether the location is relative and never climbs, read as a path of any system."""
    pure = PureWindowsPath(location)  # splits at both kinds of slash
    return not (pure.is_absolute() or pure.drive or PurePosixPath(location).is_absolute() or ".." in pure.parts)


def _check_contained(tensor: ir.ExternalTensor, model_file: Path | None) -> None:
    location = str(tensor.location)
    if not is_relative_location(location):
        raise WeightsError(
            f"expected external data inside the model's folder, found location `{location}` - at `{tensor.name}`; "
            "move the file beside the model and name it there"
        )
    homes = [Path(tensor.base_dir).resolve()]
    if model_file is not None and model_file.is_symlink():
        homes.append(model_file.resolve().parent)
    real = Path(tensor.path).resolve()
    if not any(real.is_relative_to(home) for home in homes):
        raise WeightsError(
            f"expected external data inside the model's folder, found a link from `{location}` to `{real}` - "
            f"at `{tensor.name}`; put the file itself beside the model"
        )


def _size(path: Path, tensor: ir.ExternalTensor) -> int:
    if not path.is_file():
        raise WeightsError(
            f"expected external data in the file `{path}`, found no such file - at `{tensor.name}`; "
            "put it beside the model, under the name that the model gives it"
        )
    return path.stat().st_size


def _check_extent(tensor: ir.ExternalTensor, available: int) -> None:
    expected = size_in_bytes(tensor.size, tensor.dtype)
    if tensor.length is not None and tensor.length != expected:
        raise WeightsError(
            f"expected {expected} bytes of external data for {tensor.dtype.name}{tensor.shape}, "
            f"found a length of {tensor.length} - at `{tensor.name}`; export the model again"
        )
    end = (tensor.offset or 0) + expected
    if end > available:
        raise WeightsError(
            f"expected at least {end} bytes in `{tensor.location}`, found {available} - at `{tensor.name}`; "
            "the file is cut short or belongs to another model"
        )
