"""Turn a model back into a proto in which all that was not changed is as it came, byte for byte.

onnx-ir sorts metadata, writes `ai.onnx` as the empty domain, forgets fields that are set to their default, adds a
`value_info` to each initializer, puts `value_info` into the order of the nodes, and drops sparse initializers,
training info, checksums of external data and `value_info` of outputs. So the proto that a model came from is kept
beside it, and whatever says the same in both is taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InvalidModelError
from kvsurgeon.io.gc_pause import collector_resting
from kvsurgeon.io.proto_equality import metadata_once, says_the_same, words_as_they_came

_ORIGINAL = "kvsurgeon.original"
_Named = TypeVar("_Named", onnx.ValueInfoProto, onnx.TensorAnnotation)


def remember(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Keep the proto that the model was made from beside the model."""
    model.meta[_ORIGINAL] = proto


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Return the model as a proto; what was not changed since `load` is as it came, external references included.

    Raises:
        InvalidModelError: The model holds something that cannot be written, such as a text that is not UTF-8.
    """
    with collector_resting():
        proto = _serialized(model)
        for tensor in proto.graph.initializer:
            metadata_once(tensor)
        original = model.meta.get(_ORIGINAL)
        if isinstance(original, onnx.ModelProto):
            _restore_model(proto, original)
    return proto


def _serialized(model: ir.Model) -> onnx.ModelProto:
    try:
        proto: onnx.ModelProto = ir.to_proto(model)
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InvalidModelError(f"onnx-ir {ir.__version__} cannot write this model: {cause}") from error
    return proto


def _restore_model(proto: onnx.ModelProto, original: onnx.ModelProto) -> None:
    words_as_they_came(proto, original)
    _restore_opsets(proto.opset_import, original.opset_import)
    _restore_graph(proto.graph, original.graph)
    proto.training_info.extend(original.training_info)
    earlier = {(f.domain, f.name, f.overload): f for f in original.functions}
    for function in proto.functions:
        if (came := earlier.get((function.domain, function.name, function.overload))) is not None:
            _restore_function(function, came)


def _restore_function(function: onnx.FunctionProto, original: onnx.FunctionProto) -> None:
    words_as_they_came(function, original)
    _restore_opsets(function.opset_import, original.opset_import)
    _restore_nodes(function.node, original.node)
    _restore_infos(function, original, frozenset())


def _restore_graph(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    words_as_they_came(graph, original)
    _restore_nodes(graph.node, original.node)
    _restore_each(graph.input, original.input, lambda value: value.name)
    _restore_each(graph.output, original.output, lambda value: value.name)
    _restore_references(graph.initializer, original.initializer)
    _restore_infos(graph, original, frozenset(tensor.name for tensor in graph.initializer))
    annotations = _in_order(graph.quantization_annotation, original.quantization_annotation, "tensor_name")
    _replace(graph.quantization_annotation, annotations)
    graph.sparse_initializer.extend(original.sparse_initializer)


def _restore_nodes(nodes: Iterable[onnx.NodeProto], originals: Iterable[onnx.NodeProto]) -> None:
    def by_output(node: onnx.NodeProto) -> str:
        return next((name for name in node.output if name), node.name)

    earlier = {by_output(node): node for node in originals}
    for node in nodes:
        came = earlier.get(by_output(node))
        if came is None or node == came:
            continue
        _restore_inner_graphs(node, came)
        if says_the_same(node, came):
            node.CopyFrom(came)


def _restore_inner_graphs(node: onnx.NodeProto, original: onnx.NodeProto) -> None:
    earlier = {attribute.name: attribute for attribute in original.attribute}
    for attribute in node.attribute:
        came = earlier.get(attribute.name)
        if came is None:
            continue
        if attribute.HasField("g") and came.HasField("g"):
            _restore_graph(attribute.g, came.g)
        for graph, before in zip(attribute.graphs, came.graphs, strict=False):
            _restore_graph(graph, before)


def _restore_each(messages: Iterable[Any], originals: Iterable[Any], key: Callable[[Any], str]) -> None:
    earlier = {key(message): message for message in originals}
    for message in messages:
        came = earlier.get(key(message))
        if came is not None and message != came and says_the_same(message, came):
            message.CopyFrom(came)


def _restore_references(tensors: Iterable[onnx.TensorProto], originals: Iterable[onnx.TensorProto]) -> None:
    """Write references to external data as they came: their order, and entries such as a checksum."""

    def is_external(tensor: onnx.TensorProto) -> bool:
        return tensor.data_location == onnx.TensorProto.EXTERNAL

    _restore_each(filter(is_external, tensors), filter(is_external, originals), lambda tensor: tensor.name)


def _restore_opsets(opsets: Any, originals: Any) -> None:
    """Keep the order and the spelling of domains; a version is what it is now, and new domains come last."""

    def plain(domain: str) -> str:
        return "" if domain == "ai.onnx" else domain

    now = {opset.domain: opset.version for opset in opsets}
    kept = []
    for opset in originals:
        version = now.pop(plain(opset.domain), None)
        if version == opset.version:
            kept.append(opset)
        elif version is not None:
            kept.append(onnx.OperatorSetIdProto(domain=opset.domain, version=version))
    kept += [onnx.OperatorSetIdProto(domain=domain, version=version) for domain, version in now.items()]
    _replace(opsets, kept)


def _restore_infos(holder: Any, original: Any, constants: frozenset[str]) -> None:
    """Put the infos into the order in which they came, those of new values last.

    An info that onnx-ir made up for an initializer goes. One that it left out stays if it repeats that of an input or
    output that is unchanged, says nothing but a name, or describes a name that neither graph defines.
    """
    came = original.value_info
    own = {info.name for info in came}
    infos = [info for info in holder.value_info if info.name in own or info.name not in constants]
    missing = own.difference(info.name for info in infos)
    if missing:
        bare = {info.name for info in came if not info.HasField("type")}
        kept = bare | _unchanged_ends(holder, original) | (missing - _defined(original) - _defined(holder))
        infos += [info for info in came if info.name in missing & kept]
    _replace(holder.value_info, _in_order(infos, came, "name"))


def _unchanged_ends(holder: Any, original: Any) -> set[str]:
    """Return the names of inputs and outputs that are described as they were: a function's by nodes that are."""
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
    """Return the messages in the order of the originals, new ones last; an unchanged name keeps all that it had."""
    now = {getattr(message, key): message for message in messages}
    last = {getattr(original, key): original for original in originals}  # of several with one name the last counts
    unchanged = {name for name, message in now.items() if name in last and says_the_same(message, last[name])}
    ordered = []
    for original in originals:
        name = getattr(original, key)
        if name in unchanged:
            ordered.append(original)
        elif name in now:
            ordered.append(now.pop(name))
    return ordered + [message for name, message in now.items() if name not in last]


def _replace(field: Any, messages: Iterable[Any]) -> None:
    """Let a repeated field hold these messages, some of which it may hold already."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(copies)
