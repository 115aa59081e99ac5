"""Compute the keys and values of cross-attention in the first call, in a branch of the decoder."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence, Sequence

import onnx_ir as ir

from kvsurgeon.graph.copies import copy_model, move_nodes
from kvsurgeon.graph.editor import Editor, check_free
from kvsurgeon.passes.contract import Companion

CHOICE = "use_cache_branch"  # the name in optimum and transformers.js
_KEYS = 2  # axis of keys and values of cross-attention, [batch, heads, keys, head_dim]


def compute_in_first_call(model: ir.Model, first: Companion) -> int:
    """Compute inputs of a model inside it, in its first call only, and return the number of edits.

    Before: the input `past_key_values.0.encoder.key`, which `first` computes. After: the input `use_cache_branch`, bool
    [1]. If it is false, `past_key_values.0.encoder.key` is ignored and may be empty, and is computed from the inputs of
    `first`. The output `present.0.encoder.key` returns it for later calls.

    Raises:
        UnsupportedError: The model has an input or output of one of these names; it is unchanged.
    """
    graph, editor = model.graph, Editor(model)
    inputs = {value.name or "": value for value in graph.inputs}
    names = [value.name or "" for value in first.model.graph.outputs]
    check_free(graph, (CHOICE, *names))
    pasts = [inputs[first.connections[name]] for name in names]
    results = [ir.Value(name=name, type=past.type, shape=past.shape) for name, past in zip(names, pasts, strict=True)]
    for past, result in zip(pasts, results, strict=True):
        past.replace_all_uses_with(result)
        sizes = tuple(past.shape or ())
        past.shape = ir.Shape((*sizes[:_KEYS], "past_encoder_sequence_length", *sizes[_KEYS + 1 :]))
    computed = ir.Graph((), (), nodes=(), name="first_call")
    computed.outputs.extend(
        move_nodes(copy_model(first.model).graph, graph, inputs, prefix="first_call.", branch=computed)
    )
    choice = ir.Value(name=CHOICE, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    graph.inputs.append(choice)
    editor.before = next(iter(graph), None)
    editor.operator("", "If", [choice], {"then_branch": _passed(pasts), "else_branch": computed}, results)
    editor.finish()
    graph.outputs.extend(results)
    return editor.edits


def _passed(values: Sequence[ir.Value]) -> ir.Graph:
    """Return a subgraph that returns values of the graph around it."""
    nodes = [
        ir.node("Identity", [value], outputs=[ir.Value(name=f"later_calls.{value.name}", type=value.type)])
        for value in values
    ]
    return ir.Graph((), [node.outputs[0] for node in nodes], nodes=nodes, name="later_calls")


def move_to_end(values: MutableSequence[ir.Value], names: Iterable[str]) -> None:
    """Move the inputs or outputs of these names to the end, in the order of the names."""
    by_name = {value.name: value for value in values}
    moved = [by_name[name] for name in names if name in by_name]
    for value in moved:
        values.remove(value)
    values.extend(moved)
