"""What must hold of a model after every pass, looked at without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from kvsurgeon.passes.weightless import empty, weightless

Scope = dict[str, ir.Value]


def problems(model: ir.Model, *, by_checker: bool = True) -> tuple[str, ...]:
    """Return what makes `model` invalid ONNX; empty if nothing does.

    Args:
        model: The model; its weights are not read.
        by_checker: Whether to ask `onnx.checker` too. It knows no operator that only onnxruntime has in the ONNX
            domain, so it is no judge of a model that failed with it before.
    """
    found = tuple(_structural(model))
    return found if found or not by_checker else tuple(_by_onnx_checker(model))


def _structural(model: ir.Model) -> Iterator[str]:
    yield from _of_graph(model.graph, {})
    for function in model.functions.values():
        yield from _of_graph(function.graph, {})
    yield from _untyped(model.graph.inputs, "input")
    yield from _untyped(model.graph.outputs, "output")


def _of_graph(graph: ir.Graph, outer: Scope) -> Iterator[str]:
    """Say what is wrong with names and order: what a node reads must be there, once, and before it."""
    scope = dict(outer)
    yield from _declared(graph.inputs, scope, "graph input")
    inputs = set(graph.inputs)
    yield from _declared((v for v in graph.initializers.values() if v not in inputs), scope, "initializer")
    for node in graph:
        yield from _of_inputs(node, scope)
        for attribute in node.attributes.values():
            for body in _bodies(attribute):
                yield from _of_graph(body, scope)
        yield from _declared((v for v in node.outputs if v.name != ""), scope, f"output of {node.op_type}")
    for value in graph.outputs:
        if scope.get(value.name or "") is not value:
            yield f"graph output `{value.name}` is produced by no node"


def _of_inputs(node: ir.Node, scope: Scope) -> Iterator[str]:
    for value in node.inputs:
        if value is None or value.name == "":
            continue
        found = scope.get(value.name or "")
        if found is value:
            continue
        what = "another value of that name" if found is not None else _whereabouts(value)
        yield f"{node.op_type} - at `{_output_name(node)}` reads `{value.name}`: found {what}"


def _declared(values: Iterable[ir.Value], scope: Scope, what: str) -> Iterator[str]:
    for value in values:
        if not value.name:
            yield f"{what} without a name"
        elif value.name in scope:
            yield f"{what} `{value.name}`: the name is taken twice"
        else:
            scope[value.name] = value


def _whereabouts(value: ir.Value) -> str:
    return "no node, input or initializer that makes it" if value.producer() is None else "it is made only later"


def _output_name(node: ir.Node) -> str:
    return next((value.name for value in node.outputs if value.name), node.name or "")


def _bodies(attribute: ir.Attr) -> Iterable[ir.Graph]:
    if attribute.is_ref():
        return ()
    if attribute.type is ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else ()


def _untyped(values: Iterable[ir.Value], what: str) -> Iterator[str]:
    for value in values:
        if value.type is None:
            yield f"{what} `{value.name}` has no type"


def _by_onnx_checker(model: ir.Model) -> Iterator[str]:
    try:
        onnx.checker.check_model(weightless(model, stand_in=empty))
    except onnx.checker.ValidationError as error:
        yield " ".join(str(error).split())
