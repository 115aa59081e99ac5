"""Causal convolutions: `CausalConvWithState`, and those whose last rows a `Slice` drops, by less padding.

    before: Slice(Conv(x, pads=[3, 3]), 0, 16) of 16 rows, where the convolution has 19
    after:  Conv(x, pads=[3, 0])

Nodes between them may compute each row alone. Of fixed lengths alone: the number of rows is no part of the graph any
more.
"""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.decompose.fused_node import FusedNode
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_operator
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import Dimension


def causal_conv_with_state(op: FusedNode) -> None:
    """Decompose `CausalConvWithState` along one axis, without a past.

    Raises:
        UnsupportedError: It has a past, or its rows are laid out in another way.
    """
    attributes = op.node.attributes
    if op.optional(3) is not None:
        raise op.unsupported_past()
    plain = (("ndim", 1), ("channels_last", 0), ("dilation", 1), ("state_window", 0))
    other = next((name for name, number in plain if attributes.get_int(name, number) != number), None)
    activation = attributes.get_string("activation", "none")
    if other is not None or activation not in ("none", "silu", "swish"):
        raise op.unsupported(
            f"attribute {other or 'activation'} is not known", expected="channels before rows, without gaps",
            hint="export the convolution by standard operators",
        )  # fmt: skip
    channels, width = op.size(1, 0), op.size(1, 2)
    rows = op.Conv(op.input(0), op.input(1), op.optional(2), group=channels, pads=[width - 1, 0])
    op.finish(rows if activation == "none" else op.Mul(rows, op.Sigmoid(rows)), None)


def may_drop_padding(graph: ir.Graph) -> bool:
    """Return whether a graph has a slice of a padded convolution."""
    return any(_padded(node) for node in graph)


def drop_padded_ends(editor: Editor) -> None:
    """Replace slices that drop the last rows of convolutions by less padding."""
    shapes = read_inputs(editor.graph).shapes
    for node in list(editor.graph):
        nodes = _padded(node)
        pads = _shorter(shapes, nodes, node) if nodes else None
        if pads is None:
            continue
        editor.before, value = node, nodes[0].inputs[0]
        for one in nodes:
            is_first = one is nodes[0]
            copy = editor.copy(one, [value, *one.inputs[1:]], "shorter", frozenset({"pads"} if is_first else ()))
            if is_first:
                editor.set_attributes(copy, {"pads": pads})
            value, copy.outputs[0].shape = copy.outputs[0], node.outputs[0].shape
        editor.replace(node.outputs[0], copy.outputs[0])
        editor.graph.remove(node, safe=True)
        for one in reversed(nodes):
            if not one.outputs[0].uses() and not one.outputs[0].is_graph_output():
                editor.graph.remove(one, safe=True)


def _padded(node: ir.Node) -> list[ir.Node]:
    """Return the convolution with stated padding of whose rows a node is a slice, and the nodes between, in order."""
    nodes: list[ir.Node] = []
    one = node.inputs[0].producer() if is_operator(node, "Slice") and node.inputs[0] is not None else None
    while one is not None:
        nodes.insert(0, one)
        if has_trait(one, Trait.CONVOLUTION):
            return nodes if any(one.attributes.get_ints("pads") or ()) else []
        is_next = has_trait(one, Trait.ELEMENTWISE, Trait.BROADCAST) and one.inputs[0] is not None
        one = one.inputs[0].producer() if is_next else None  # type: ignore[union-attr]
    return []


def _shorter(shapes: Shapes, nodes: list[ir.Node], node: ir.Node) -> list[int] | None:
    """Return the padding without the rows that a slice drops; None if it drops other rows, or of unknown number."""
    conv = nodes[0]
    pads, sizes = list(conv.attributes.get_ints("pads") or ()), shapes[conv.outputs[0]].shape
    kept, call = shapes[node.outputs[0]].shape, shapes.call(node)
    starts, axes, steps = (call.numbers(index) for index in (1, 3, 4))
    if sizes is None or kept is None or starts is None or axes is None or any(starts):
        return None
    if any(step != 1 for step in (*(steps or ()), *(conv.attributes.get_ints("strides") or ()))):
        return None
    spatial = len(sizes) - 2
    for axis, (size, left) in enumerate(zip(sizes, kept, strict=True)):
        if size == left:
            continue
        dropped = size - left if isinstance(size, int) and isinstance(left, int) else None
        place = spatial + axis - 2
        if dropped is None or axis < 2 or dropped > pads[place] or not _is_row_by_row(shapes, nodes[1:], axis, sizes):
            return None
        pads[place] -= dropped
    return pads


def _is_row_by_row(shapes: Shapes, nodes: list[ir.Node], axis: int, sizes: tuple[Dimension, ...]) -> bool:
    """Return whether nodes keep the shape of their first input, and their other inputs have one row at most."""
    for node in nodes:
        further = [shapes[value].shape for value in node.inputs[1:] if value is not None]
        if shapes[node.outputs[0]].shape != sizes or None in further:
            return False
        if any((1, *shape)[max(axis - len(sizes), -len(shape) - 1)] != 1 for shape in further if shape is not None):
            return False
    return True
