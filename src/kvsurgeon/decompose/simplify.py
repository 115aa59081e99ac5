"""Simplify a model: inline functions and branches, remove sequences, roll up loops, multiply two tensors at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import sympy
from onnx_ir.passes.common import InlinePass

from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.decompose.causal_convolutions import drop_padded_ends, may_drop_padding
from kvsurgeon.decompose.chunked_regions import may_be_chunked
from kvsurgeon.decompose.delta_rule import replace_chunked_rules
from kvsurgeon.decompose.einsums import is_splittable, split_einsums
from kvsurgeon.decompose.scan_builder import roll_up_loops
from kvsurgeon.decompose.sequences import MAKERS, remove_sequences
from kvsurgeon.decompose.unrolled_loops import may_be_unrolled
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.branches import inline_branch
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.query import is_operator, producer_of
from kvsurgeon.ops.content import depends_on_input
from kvsurgeon.ops.gather import FAR


def simplify_model(model: ir.Model) -> ir.Model:
    """Return a model without local functions, sequences, and `Einsum` of more than two tensors.

    The original is not changed: the result is a copy, or the original itself if there is nothing to simplify.
    """
    calls = any(node.op_identifier() in model.functions for node in model.graph.all_nodes())
    sequences = any(node.op_type in MAKERS for node in model.graph)
    certain = calls or sequences or any(is_splittable(node) or _slices_to_end(node) for node in model.graph)
    is_fixed = all(isinstance(size, int) for value in model.graph.inputs for size in value.shape or ())
    rewritten = is_fixed, may_be_unrolled(model.graph), may_drop_padding(model.graph), may_be_chunked(model.graph)
    if not certain and not any(rewritten) and not any(is_operator(node, "If") for node in model.graph):
        return model
    copy = copy_model(model)
    if calls:
        _align_local_domains(copy)
        InlinePass()(copy)
    editor = Editor(copy)
    _take_decided_branches(editor)
    remove_sequences(editor)
    split_einsums(editor)
    _gather_to_end(editor)
    if is_fixed:
        _remove_copies(copy.graph)
    if may_drop_padding(copy.graph):
        drop_padded_ends(editor)
    if may_be_chunked(copy.graph):
        replace_chunked_rules(editor)
    if may_be_unrolled(copy.graph):
        roll_up_loops(editor)
    return copy if certain or editor.edits else model


def _remove_copies(graph: ir.Graph) -> None:
    """Remove nodes that copy a tensor: bodies of a loop may differ by some of them."""
    shapes = read_inputs(graph).shapes
    for node in list(graph):
        source = _copied(shapes, node)
        if source is not None and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)


def _copied(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    """Return what an `Identity` copies, or a `Cast` to the type that a tensor had before it was cast to a wider one."""
    source = node.inputs[0] if is_operator(node, "Identity", "Cast") else None
    if source is None or is_operator(node, "Identity"):
        return source
    inner = producer_of(source, "Cast")
    origin = inner.inputs[0] if inner is not None and inner.inputs[0] is not None else source
    before, wide, after = (shapes[value].dtype for value in (origin, source, node.outputs[0]))
    if before is None or wide is None or before is not after:
        return None
    is_exact = before is ir.DataType.BOOL or before.is_floating_point() == wide.is_floating_point()
    return origin if is_exact and np.can_cast(before.numpy(), wide.numpy()) else None


def _align_local_domains(model: ir.Model) -> None:
    """Set one version for the domains of local functions: exporters write different ones, which mean nothing."""
    local = {domain for domain, _, _ in model.functions}
    for function in model.functions.values():
        for domain in local & set(function.opset_imports) & set(model.opset_imports):
            function.opset_imports[domain] = model.opset_imports[domain]


def _take_decided_branches(editor: Editor) -> None:
    """Replace each `If` whose condition is the same for all inputs by the branch that runs.

    Exporters write a squeeze of an axis whose size they do not know as an `If` on that size. One is replaced at a time,
    because the condition of a later one may depend on the shape of its outputs.
    """
    while (decided := _first_decided(editor.graph)) is not None:
        node, taken = decided
        inline_branch(editor, node, node.attributes["then_branch" if taken else "else_branch"].as_graph())
        editor.before = None


def _first_decided(graph: ir.Graph) -> tuple[ir.Node, bool] | None:
    """Return the first `If` whose condition is known from sizes, and the condition; None if there is none."""
    nodes = [node for node in graph if is_operator(node, "If")]
    try:
        shapes = read_inputs(graph).shapes if nodes else None
    except UnsupportedError:
        return None  # the analysis says why
    for node in nodes:
        condition = node.inputs[0]
        if shapes is not None and condition is not None and _is_certain(shapes, condition):
            return node, bool(shapes[condition].value.item())  # type: ignore[union-attr]
    return None


def _is_certain(shapes: Shapes, condition: ir.Value) -> bool:
    """Return whether a condition compares known integers: one on a length may hold up to the end of a table only."""
    value = shapes[condition].value
    if value is None or any(isinstance(one, sympy.Expr) for one in value.flat):
        return False
    node = condition.producer()
    booleans = shapes[condition].dtype is ir.DataType.BOOL
    return node is None or not booleans or all(_is_certain(shapes, one) for one in node.inputs if one is not None)


def _slices_to_end(node: ir.Node) -> bool:
    """Return whether a node slices one axis from a place that an input gives to the end."""
    if not is_operator(node, "Slice") or len(node.inputs) < 4:
        return False
    _, start, *bounds = node.inputs
    if start is None or len([one for one in bounds if one is not None]) < len(bounds) or not depends_on_input(start):
        return False
    numbers = [small_constant(one) for one in bounds]
    end, _, *step = [None if one is None or one.size != 1 else one.item() for one in numbers]
    return end is not None and end >= FAR and numbers[1] is not None and numbers[1].size == 1 and step in ([], [1])


def _gather_to_end(editor: Editor) -> None:
    """Replace such slices by lookups of their places, which the analysis can run."""
    for node in [node for node in editor.graph if _slices_to_end(node)]:
        editor.before, value = node, node.outputs[0]
        op = NodeBuilder(editor, value.name or "slice", like=node)
        data, start, _, axis = node.inputs[:4]
        size = op.Gather(op.Shape(data), axis, axis=0)
        place = op.Reshape(op.Cast(start, to=ir.DataType.INT64), op.int64([1]))
        from_end = op.Max(op.Add(place, size), op.int64([0]))
        first = op.Where(op.Less(place, op.int64([0])), from_end, op.Min(place, size))
        places = op.Range(op.Squeeze(first), op.Squeeze(size), op.int64(1))
        numbers = small_constant(axis)
        gathered = op.Gather(data, places, axis=int(np.ravel(numbers)[0]))  # type: ignore[arg-type]
        gathered.type, gathered.shape = value.type, value.shape
        editor.replace(value, gathered)
        editor.graph.remove(node)
        editor.before = None
