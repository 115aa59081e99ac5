"""Convert a model to a proto in which everything unchanged is byte for byte as in the loaded proto.

onnx-ir sorts metadata, writes `ai.onnx` as the empty domain, drops fields that are set to their default, adds a
`value_info` for each initializer, orders `value_info` by node, and drops sparse initializers, training info, checksums
of external data and the `value_info` of outputs. So the loaded proto is kept with the model, and each equivalent
message is copied from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InvalidModelError
from kvsurgeon.io.gc_pause import gc_paused
from kvsurgeon.io.proto_equality import deduplicate_metadata, is_equivalent, restore_scalars
from kvsurgeon.io.stored_weights import referred_to

_ORIGINAL = "kvsurgeon.original"
_Named = TypeVar("_Named", onnx.ValueInfoProto, onnx.TensorAnnotation)


def keep_original(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Keep the proto that a model was loaded from with the model."""
    model.meta[_ORIGINAL] = proto


def to_proto(model: ir.Model, folder: Path | None = None) -> onnx.ModelProto:
    """Return a model as a proto; everything unchanged since `load` is byte for byte as in the file.

    Args:
        model: The model.
        folder: If given, weights in a model file in this folder are not read, but referred to as external data.

    Raises:
        InvalidModelError: The model has content that cannot be written, such as text that is not UTF-8.
    """
    with gc_paused(), nullcontext() if folder is None else referred_to(model, folder):
        proto = _serialized(model)
        for tensor in proto.graph.initializer:
            deduplicate_metadata(tensor)
        original = model.meta.get(_ORIGINAL)
        if isinstance(original, onnx.ModelProto):
            _restore_model(proto, original)
    return proto


def _serialized(model: ir.Model) -> onnx.ModelProto:
    try:
        proto: onnx.ModelProto = ir.to_proto(model)
    except ir.serde.SerdeError as error:
        raise InvalidModelError(f"onnx-ir {ir.__version__} cannot write this model: {root_cause(error)}") from error
    return proto


def root_cause(error: BaseException) -> str:
    """Return the first line of the message of the error that caused an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)


def _restore_model(proto: onnx.ModelProto, original: onnx.ModelProto) -> None:
    restore_scalars(proto, original)
    _restore_opsets(proto.opset_import, original.opset_import)
    _restore_graph(proto.graph, original.graph)
    proto.training_info.extend(original.training_info)
    originals = {(f.domain, f.name, f.overload): f for f in original.functions}
    for function in proto.functions:
        if (before := originals.get((function.domain, function.name, function.overload))) is not None:
            restore_scalars(function, before)
            _restore_opsets(function.opset_import, before.opset_import)
            _restore_nodes(function.node, before.node)
            _restore_infos(function, before, frozenset())


def _restore_graph(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    restore_scalars(graph, original)
    _restore_nodes(graph.node, original.node)
    _restore_each(graph.input, original.input, lambda value: value.name)
    _restore_each(graph.output, original.output, lambda value: value.name)
    _restore_external_tensors(graph.initializer, original.initializer)
    _restore_infos(graph, original, frozenset(tensor.name for tensor in graph.initializer))
    annotations = _in_order(graph.quantization_annotation, original.quantization_annotation, "tensor_name")
    _replace(graph.quantization_annotation, annotations)
    graph.sparse_initializer.extend(original.sparse_initializer)


def _restore_nodes(nodes: Iterable[onnx.NodeProto], originals: Iterable[onnx.NodeProto]) -> None:
    def key(node: onnx.NodeProto) -> str:
        return next((name for name in node.output if name), node.name)

    _restore_each(nodes, originals, key, _restore_subgraphs)


def _restore_subgraphs(node: onnx.NodeProto, original: onnx.NodeProto) -> None:
    originals = {attribute.name: attribute for attribute in original.attribute}
    for attribute in node.attribute:
        before = originals.get(attribute.name)
        if before is None:
            continue
        if attribute.HasField("g") and before.HasField("g"):
            _restore_graph(attribute.g, before.g)
        for graph, graph_before in zip(attribute.graphs, before.graphs, strict=False):
            _restore_graph(graph, graph_before)


def _restore_each(
    messages: Iterable[Any],
    originals: Iterable[Any],
    key: Callable[[Any], str],
    restore_parts: Callable[[Any, Any], None] | None = None,
) -> None:
    """Replace each message by the original of the same key if they are equivalent."""
    by_key = {key(message): message for message in originals}
    for message in messages:
        original = by_key.get(key(message))
        if original is None or message == original:
            continue
        if restore_parts is not None:
            restore_parts(message, original)
        if is_equivalent(message, original):
            message.CopyFrom(original)


def _restore_external_tensors(tensors: Iterable[onnx.TensorProto], originals: Iterable[onnx.TensorProto]) -> None:
    """Restore references to external data: the order of their entries, and entries such as a checksum."""

    def is_external(tensor: onnx.TensorProto) -> bool:
        return tensor.data_location == onnx.TensorProto.EXTERNAL

    _restore_each(filter(is_external, tensors), filter(is_external, originals), lambda tensor: tensor.name)


def _restore_opsets(opsets: Any, originals: Any) -> None:
    """Restore the order and the names of domains; versions are current, and new domains come last."""
    versions = {opset.domain: opset.version for opset in opsets}
    ordered = []
    for opset in originals:
        version = versions.pop("" if opset.domain == "ai.onnx" else opset.domain, None)
        if version == opset.version:
            ordered.append(opset)
        elif version is not None:
            ordered.append(onnx.OperatorSetIdProto(domain=opset.domain, version=version))
    ordered += [onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in versions.items()]
    _replace(opsets, ordered)


def _restore_infos(holder: Any, original: Any, constants: frozenset[str]) -> None:
    """Restore the order of `value_info`; infos of new values come last.

    An info that onnx-ir added for an initializer is removed. One that it dropped is restored if it repeats that of an
    unchanged input or output, has only a name, or describes a name that neither graph defines.
    """
    names = {info.name for info in original.value_info}
    infos = [info for info in holder.value_info if info.name in names or info.name not in constants]
    missing = names.difference(info.name for info in infos)
    if missing:
        untyped = {info.name for info in original.value_info if not info.HasField("type")}
        restored = untyped | _unchanged_interface(holder, original) | (missing - _defined(original) - _defined(holder))
        infos += [info for info in original.value_info if info.name in missing & restored]
    _replace(holder.value_info, _in_order(infos, original.value_info, "name"))


def _unchanged_interface(holder: Any, original: Any) -> set[str]:
    """Return the names of unchanged inputs and outputs; all inputs of a function whose nodes are unchanged."""
    if isinstance(holder, onnx.FunctionProto):
        return set(holder.input) if list(holder.node) == list(original.node) else set()
    before = {value.name: value for value in (*original.input, *original.output)}
    return {value.name for value in (*holder.input, *holder.output) if before.get(value.name) == value}


def _defined(holder: Any) -> set[str]:
    names = {name for node in holder.node for name in node.output}
    if isinstance(holder, onnx.FunctionProto):
        return names.union(holder.input)
    return names.union(value.name for value in (*holder.input, *holder.initializer))


def _in_order(messages: Iterable[_Named], originals: Iterable[_Named], key: str) -> list[_Named]:
    """Return messages in the order of the originals, new ones last; equivalent ones are replaced by the originals."""
    current = {getattr(message, key): message for message in messages}
    last = {getattr(original, key): original for original in originals}  # of several with one name, the last counts
    unchanged = {name for name, message in current.items() if name in last and is_equivalent(message, last[name])}
    ordered = []
    for original in originals:
        name = getattr(original, key)
        if name in unchanged:
            ordered.append(original)
        elif name in current:
            ordered.append(current.pop(name))
    return ordered + [message for name, message in current.items() if name not in last]


def _replace(field: Any, messages: Iterable[Any]) -> None:
    """Replace the content of a repeated field by messages, which may be in the field already."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(copies)
