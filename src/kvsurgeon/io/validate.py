"""Check that a proto is a graph: names are defined once, and before they are read, without cycles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter

import onnx

from kvsurgeon.errors import InvalidModelError
from kvsurgeon.io.local_functions import check_functions
from kvsurgeon.io.tensors import Describe, check_tensor

_OWN_DOMAINS = frozenset({"", "ai.onnx"})
_Attribute = onnx.AttributeProto


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The findings of a walk through the nodes of a graph.

    Attributes:
        free: Names that an enclosing graph must define, each with a reader.
        ordered: Whether each value is computed before it is read, also in subgraphs.
        external: Whether a tensor has external data, also in subgraphs.
    """

    free: dict[str, str]
    ordered: bool
    external: bool = False


_EXTERNAL = Scope(free={}, ordered=True, external=True)


def check_model(proto: onnx.ModelProto) -> Scope:
    """Check all graphs and functions of a model, and return the findings.

    Raises:
        InvalidModelError: The model is invalid; the message names the value.
        WeightsError: A reference to external data is invalid.
    """
    if not proto.HasField("graph"):
        raise InvalidModelError("expected a model with a graph, found none; the file is damaged or not a model")
    _check_versions(proto)
    scopes = [_check_graph(proto.graph), *map(_check_function, proto.functions)]
    for scope in scopes:
        for name, reader in scope.free.items():
            raise InvalidModelError(
                f"expected an input, an initializer or an output of a node named `{name}`, found none, "
                f"but {reader} reads it; export the model again"
            )
    if not proto.graph.output:
        raise InvalidModelError("expected a graph with outputs, found none; the file is truncated, export it again")
    check_functions(proto)
    ordered, external = all(scope.ordered for scope in scopes), any(scope.external for scope in scopes)
    return Scope(free={}, ordered=ordered, external=external)


def _check_versions(proto: onnx.ModelProto) -> None:
    if not 0 < proto.ir_version <= onnx.IR_VERSION:
        raise InvalidModelError(
            f"expected an ir_version from 1 to {onnx.IR_VERSION}, found {proto.ir_version}; "
            f"a newer `onnx` than {onnx.__version__} may read it"
        )
    newest = onnx.defs.onnx_opset_version()
    if not proto.opset_import:
        raise InvalidModelError("expected operator set versions, found no opset_import")
    for opset in proto.opset_import:
        if opset.domain in _OWN_DOMAINS and not 0 < opset.version <= newest:
            raise InvalidModelError(
                f"expected an opset from 1 to {newest}, found {opset.version}; "
                f"a newer `onnx` than {onnx.__version__} may read it"
            )


def _check_graph(graph: onnx.GraphProto) -> Scope:
    external = sum(check_tensor(tensor, _by_name(tensor)) for tensor in graph.initializer) > 0
    for sparse in graph.sparse_initializer:
        check_tensor(sparse.values, _by_name(sparse.values))
        check_tensor(sparse.indices, _by_name(sparse.values))
    inputs = [value.name for value in graph.input]
    constants = [tensor.name for tensor in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    scope = _check_nodes(graph.node, inputs, constants, [value.name for value in graph.output])
    return replace(scope, external=external or scope.external)


def _check_function(function: onnx.FunctionProto) -> Scope:
    return _check_nodes(function.node, function.input, (), function.output)


def _check_nodes(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], constants: Iterable[str], outputs: Iterable[str]
) -> Scope:
    if len(set(inputs)) < len(inputs):
        raise InvalidModelError(f"expected inputs of different names, found {', '.join(inputs)}")
    known = {*inputs, *constants}  # an initializer with the name of an input is its default
    undefined: dict[str, str] = {}
    ordered, external = True, False
    for node in nodes:
        for inner in _inner_scopes(node):
            ordered, external = ordered and inner.ordered, external or inner.external
            undefined.update({name: reader for name, reader in inner.free.items() if name not in known})
        for name in node.input:
            if name and name not in known and name not in undefined:
                undefined[name] = _describe(node)
        for name in node.output:
            if name in known:
                raise InvalidModelError(
                    f"{_describe(node)} computes `{name}`: expected a new name, found one that is defined already"
                )
            if name:
                known.add(name)
    _check_utf8(known)
    if not known.isdisjoint(undefined):
        _check_acyclic(nodes)
        ordered = False
    undefined.update({name: "the list of graph outputs" for name in outputs if name not in known})
    free = {name: reader for name, reader in undefined.items() if name not in known}
    return Scope(free=free, ordered=ordered, external=external)


def _inner_scopes(node: onnx.NodeProto) -> Iterator[Scope]:
    """Check the tensors and subgraphs of a node, and yield the findings of the subgraphs."""
    for attribute in node.attribute:
        kind = attribute.type
        if kind == _Attribute.TENSOR:
            if check_tensor(attribute.t, lambda: _describe(node)):
                yield _EXTERNAL
        elif kind == _Attribute.GRAPH:
            yield _check_graph(attribute.g)
        elif kind == _Attribute.UNDEFINED and not attribute.ref_attr_name:
            raise InvalidModelError(
                f"expected an attribute with a type, found `{attribute.name}` - at {_describe(node)}"
            )
        elif kind == _Attribute.TENSORS:
            for tensor in attribute.tensors:
                if check_tensor(tensor, lambda: _describe(node)):
                    yield _EXTERNAL
        elif kind == _Attribute.GRAPHS:
            yield from map(_check_graph, attribute.graphs)


def _check_acyclic(nodes: Sequence[onnx.NodeProto]) -> None:
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for node in nodes:
        needs = {name for inner in _inner_scopes(node) for name in inner.free}.union(node.input)
        for name in node.output:
            sorter.add(name, *needs)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = " -> ".join(f"`{name}`" for name in error.args[1][:6])
        raise InvalidModelError(
            f"expected a graph without cycles, found a value that depends on itself: {cycle}"
        ) from None


def _check_utf8(names: Iterable[object]) -> None:
    """Check that all names are text: protobuf returns bytes for text that is not UTF-8."""
    for name in names:
        if isinstance(name, bytes):
            raise InvalidModelError(f"expected names in UTF-8, found {name!r}; the file is damaged, export it again")


def _by_name(tensor: onnx.TensorProto) -> Describe:
    return lambda: f"`{tensor.name}`"


def _describe(node: onnx.NodeProto) -> str:
    """Return the name of a node in messages: its output, since node names can be empty."""
    output = next((name for name in node.output if name), None)
    return f"{node.op_type} `{output}`" if output else f"{node.op_type} without an output"
