"""External data of a model: which files it is in, and whether they can contain it. Weights are never read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from kvsurgeon.errors import WeightsError
from kvsurgeon.io.tensors import size_in_bytes


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of external data.

    Attributes:
        path: The path of the file.
        location: The path in the model, relative to its folder.
        bytes: Size of the whole file.
    """

    path: Path
    location: str
    bytes: int


class ContainedTensor(ir.ExternalTensor):
    """An external tensor whose path `check_weights` has checked.

    onnx-ir would check it again on each read, and reject two cases that are safe here: a data file with several hard
    links, by which `save` shares weights between folders, and the symlinked snapshots of the Hugging Face cache.
    """

    __slots__ = ()

    def _check_path_containment(self) -> None:
        """Do nothing: the path was checked when the model was loaded."""


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield all tensors of a model whose data is in another file."""
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                yield from (tensor for tensor in _tensors(attribute) if isinstance(tensor, ir.ExternalTensor))


def _tensors(attribute: ir.Attr) -> Sequence[object]:
    if attribute.type == ir.AttributeType.TENSOR:
        return (attribute.value,)  # `as_tensor` checks a protocol, which takes longer than loading
    return attribute.value or () if attribute.type == ir.AttributeType.TENSORS else ()


def weight_files(model: ir.Model) -> tuple[WeightFile, ...]:
    """Return the files of external data, in the order in which the model refers to them.

    Raises:
        WeightsError: A file is missing.
    """
    return files_of(external_tensors(model))


def files_of(tensors: Iterable[ir.ExternalTensor]) -> tuple[WeightFile, ...]:
    """Return the files of these tensors, each once.

    Raises:
        WeightsError: A file is missing.
    """
    first = {str(tensor.location): tensor for tensor in tensors}
    return tuple(
        WeightFile(path=Path(tensor.path), location=location, bytes=_file_size(Path(tensor.path), tensor))
        for location, tensor in first.items()
    )


def check_weights(model: ir.Model, *, model_file: Path | None = None) -> None:
    """Check that each external tensor fits into a file in the folder of the model.

    Args:
        model: A model whose external tensors have a base folder.
        model_file: The file of the model. If it is a symlink, as in the Hugging Face cache, external data can also be
            in the folder of its target.

    Raises:
        WeightsError: A file is missing, too short, or outside the folder; or a length is not that of the tensor.
    """
    sizes: dict[str, int] = {}  # each file is checked once
    for tensor in external_tensors(model):
        location = str(tensor.location)
        if location not in sizes:
            _check_contained(tensor, model_file)
            sizes[location] = _file_size(Path(tensor.path), tensor)
        _check_extent(tensor, sizes[location])


def is_relative_location(location: str) -> bool:
    """Return whether a location is relative and stays in its folder, on any operating system."""
    if "\0" in location:
        return False  # no file can have this name
    pure = PureWindowsPath(location)  # splits at both kinds of slash
    return not (pure.is_absolute() or pure.drive or PurePosixPath(location).is_absolute() or ".." in pure.parts)


def rename_locations(proto: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Replace the locations of external tensors by their new names."""
    functions = (node for function in proto.functions for node in function.node)
    for tensor in (*_tensors_in(proto.graph.node, proto.graph.initializer), *_tensors_in(functions)):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names.get(entry.value, entry.value)


def _tensors_in(
    nodes: Iterable[onnx.NodeProto], initializers: Iterable[onnx.TensorProto] = ()
) -> Iterator[onnx.TensorProto]:
    yield from initializers
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors_in(graph.node, graph.initializer)


def _check_contained(tensor: ir.ExternalTensor, model_file: Path | None) -> None:
    location = str(tensor.location)
    if not is_relative_location(location):
        raise WeightsError(
            f"expected external data in the folder of the model, found location `{location}` - at `{tensor.name}`; "
            "move the file into the folder and change the location"
        )
    folders = [Path(tensor.base_dir).resolve()]
    if model_file is not None and model_file.is_symlink():
        folders.append(model_file.resolve().parent)
    real = Path(tensor.path).resolve()
    if not any(real.is_relative_to(folder) for folder in folders):
        raise WeightsError(
            f"expected external data in the folder of the model, found a link from `{location}` to `{real}` - "
            f"at `{tensor.name}`; move the file itself into the folder"
        )


def _file_size(path: Path, tensor: ir.ExternalTensor) -> int:
    try:
        is_file = path.is_file()
    except OSError:  # such as a name that is too long
        is_file = False
    if not is_file:
        raise WeightsError(
            f"expected external data in the file `{path}`, found no such file - at `{tensor.name}`; "
            "move the file into the folder of the model, under this name"
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
            "the file is truncated or belongs to another model"
        )
