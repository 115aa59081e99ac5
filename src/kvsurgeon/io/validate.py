"""Is a proto a graph? Every name is defined once, every name that is read is defined, and no value needs itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter

import onnx

from kvsurgeon.errors import InvalidModelError
from kvsurgeon.io.tensors import Where, check_tensor

_OWN_DOMAINS = frozenset({"", "ai.onnx"})
_Attribute = onnx.AttributeProto


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a walk through the nodes of a graph found."""

    free: dict[str, str]  # names that must come from an enclosing graph, and who reads them
    ordered: bool  # every value is made before it is read, here and in the graphs inside
    external: bool = False  # a tensor, here or inside, has its data in another file


_OUTSIDE = Scope(free={}, ordered=True, external=True)


def check_model(proto: onnx.ModelProto) -> Scope:
    """Return what was found in all graphs and functions, if the proto holds a graph; no name is free.

    Raises:
        InvalidModelError: It does not; the message names the value at which it fails.
        WeightsError: A reference to external data is no reference.
    """
    if not proto.HasField("graph"):
        raise InvalidModelError("expected a model with a graph, found none; the file is damaged or is no model")
    _check_versions(proto)
    scopes = [_check_graph(proto.graph), *map(_check_function, proto.functions)]
    for scope in scopes:
        for name, reader in scope.free.items():
            raise InvalidModelError(
                f"expected an input, an initializer or a node's output named `{name}`, found none, "
                f"and {reader} reads it; export the model again"
            )
    if not proto.graph.output:
        raise InvalidModelError("expected a graph with outputs, found none; the file is cut short, export it again")
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
        raise InvalidModelError("expected a model that says which operator sets it uses, found no opset_import")
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
    known = {*inputs, *constants}  # an initializer may bear the name of an input: it is its default
    awaited: dict[str, str] = {}
    ordered, external = True, False
    for node in nodes:
        for inner in _inner_scopes(node):
            ordered, external = ordered and inner.ordered, external or inner.external
            awaited.update({name: reader for name, reader in inner.free.items() if name not in known})
        for name in node.input:
            if name and name not in known and name not in awaited:
                awaited[name] = _spoken(node)
        for name in node.output:
            if name in known:
                raise InvalidModelError(f"{_spoken(node)} makes `{name}`, expected a new name, found one that is taken")
            if name:
                known.add(name)
    _check_spelling(known)
    if not known.isdisjoint(awaited):
        _check_acyclic(nodes)
        ordered = False
    awaited.update({name: "the list of graph outputs" for name in outputs if name not in known})
    free = {name: reader for name, reader in awaited.items() if name not in known}
    return Scope(free=free, ordered=ordered, external=external)


def _inner_scopes(node: onnx.NodeProto) -> Iterator[Scope]:
    """Check the tensors and the graphs that a node carries, and yield what the graphs found."""
    for attribute in node.attribute:
        kind = attribute.type
        if kind == _Attribute.TENSOR:
            if check_tensor(attribute.t, lambda: _spoken(node)):
                yield _OUTSIDE
        elif kind == _Attribute.GRAPH:
            yield _check_graph(attribute.g)
        elif kind == _Attribute.UNDEFINED and not attribute.ref_attr_name:
            raise InvalidModelError(f"expected an attribute with a type, found `{attribute.name}` - at {_spoken(node)}")
        elif kind == _Attribute.TENSORS:
            for tensor in attribute.tensors:
                if check_tensor(tensor, lambda: _spoken(node)):
                    yield _OUTSIDE
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
        around = " -> ".join(f"`{name}`" for name in error.args[1][:6])
        raise InvalidModelError(f"expected a graph without cycles, found a value that needs itself: {around}") from None


def _check_spelling(names: Iterable[object]) -> None:
    """Leave quietly if all names are text: protobuf hands out as bytes what is not UTF-8."""
    for name in names:
        if isinstance(name, bytes):
            raise InvalidModelError(f"expected names in UTF-8, found {name!r}; the file is damaged, export it again")


def _by_name(tensor: onnx.TensorProto) -> Where:
    return lambda: f"`{tensor.name}`"


def _spoken(node: onnx.NodeProto) -> str:
    """Return how a message names a node: by its output, as ONNX node names may be empty."""
    output = next((name for name in node.output if name), None)
    return f"{node.op_type} `{output}`" if output else f"{node.op_type} without an output"
