"""Check that a model is valid ONNX, without reading its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from kvsurgeon.io.gc_pause import gc_paused
from kvsurgeon.passes.weightless import empty_tensor, weightless_proto

Scope = dict[str, ir.Value]


def problems(model: ir.Model, *, by_checker: bool = True) -> tuple[str, ...]:
    """Return what makes a model invalid; empty if it is valid.

    Args:
        model: The model; its weights are not read.
        by_checker: Whether to run `onnx.checker` too. It rejects operators that onnxruntime adds to the ONNX domain,
            so use it only for a model that passed before.
    """
    with gc_paused():
        found = tuple(_structure(model))
        return found if found or not by_checker else tuple(_check(model))


def _structure(model: ir.Model) -> Iterator[str]:
    yield from _graph(model.graph, {})
    for function in model.functions.values():
        yield from _graph(function.graph, {})
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        yield from (f"{kind} `{value.name}` has no type" for value in values if value.type is None)


def _graph(graph: ir.Graph, outer: Scope) -> Iterator[str]:
    """Yield errors of names and order: each value must be defined once, before the first node that reads it."""
    scope = dict(outer)
    yield from _define(graph.inputs, scope, "graph input")
    inputs = set(graph.inputs)
    yield from _define((value for value in graph.initializers.values() if value not in inputs), scope, "initializer")
    for node in graph:
        yield from _inputs(node, scope)
        for attribute in node.attributes.values():
            for body in _subgraphs(attribute):
                yield from _graph(body, scope)
        yield from _define((value for value in node.outputs if value.name != ""), scope, f"output of {node.op_type}")
    for value in graph.outputs:
        if scope.get(value.name or "") is not value:
            yield f"graph output `{value.name}` is not computed by any node"


def _inputs(node: ir.Node, scope: Scope) -> Iterator[str]:
    output = next((value.name for value in node.outputs if value.name), node.name or "")
    for value in node.inputs:
        if value is None or value.name == "" or scope.get(value.name or "") is value:
            continue
        if value.name in scope:
            found = "another value of that name"
        elif value.producer() is None:
            found = "no node, input or initializer of that name"
        else:
            found = "a later node that computes it"
        yield f"{node.op_type} - at `{output}` reads `{value.name}`: found {found}"


def _define(values: Iterable[ir.Value], scope: Scope, kind: str) -> Iterator[str]:
    for value in values:
        if not value.name:
            yield f"{kind} without a name"
        elif value.name in scope:
            yield f"{kind} `{value.name}`: duplicate name"
        else:
            scope[value.name] = value


def _subgraphs(attribute: ir.Attr) -> Iterable[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type is ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else ()


def _check(model: ir.Model) -> Iterator[str]:
    try:
        onnx.checker.check_model(weightless_proto(model, empty_tensor))
    except onnx.checker.ValidationError as error:
        yield " ".join(str(error).split())
