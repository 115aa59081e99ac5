"""Remove sequences of tensors whose elements are read at constant positions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.editor import Editor

MAKERS = frozenset({"SplitToSequence", "SequenceConstruct"})

Elements = dict[int, ir.Value]  # by position; negative positions count from the end


def remove_sequences(editor: Editor) -> None:
    """Replace sequences by `Split`, `Slice`, `Gather` and `Concat`; those that are used in other ways stay."""
    for node in list(editor.graph):
        if node.op_type == "SplitToSequence":
            _replace_split(editor, node)
        elif node.op_type == "SequenceConstruct":
            _replace_construct(editor, node)


def _replace_split(editor: Editor, node: ir.Node) -> None:
    positions = _positions_read(node)
    split = node.inputs[1] if len(node.inputs) > 1 else None
    sizes = small_constant(split)
    if positions is None or (split is not None and sizes is None):
        return
    editor.before = node
    if sizes is not None and sizes.ndim == 1:
        _replace_reads(editor, node, _split(editor, node, len(sizes)), positions)
    elif min(positions.values(), default=0) >= 0:
        size = (
            None if sizes is None and not node.attributes.get_int("keepdims", 1) else int(1 if sizes is None else sizes)
        )
        elements = {position: _element(editor, node, position, size) for position in sorted(set(positions.values()))}
        _replace_reads(editor, node, elements, positions)


def _positions_read(node: ir.Node) -> dict[ir.Node, int] | None:
    """Return the readers of a sequence with the position that each reads; None if one does something else."""
    positions: dict[ir.Node, int] = {}
    for user, _ in node.outputs[0].uses():
        position = small_constant(user.inputs[1]) if user.op_type == "SequenceAt" else None
        if position is None:
            return None
        positions[user] = int(position)
    return None if node.outputs[0].is_graph_output() else positions


def _split(editor: Editor, node: ir.Node, count: int) -> Elements:
    """Add a `Split` into parts of the given sizes."""
    parts = ir.Node(
        "", "Split", node.inputs[:2], [_axis(node)], num_outputs=count, name=node.name,
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    for number, value in enumerate(parts.outputs):
        value.name = f"{node.outputs[0].name}.{number}"
    editor.insert(parts)
    return {position: parts.outputs[position] for position in range(-count, count)}


def _element(editor: Editor, node: ir.Node, position: int, size: int | None) -> ir.Value:
    """Add one of many parts of equal size, of which the last may be smaller; without the axis if the size is None."""
    name = f"{node.outputs[0].name}.{position}"

    def constant(numbers: int | list[int], suffix: str) -> ir.Value:
        return editor.initializer(ir.Tensor(np.array(numbers, np.int64), name=f"{name}.{suffix}"))

    if size is None:
        part = ir.Node("", "Gather", [node.inputs[0], constant(position, "place")], [_axis(node)], name=name)
    else:
        bounds = [position * size, (position + 1) * size, _axis(node).as_int()]
        inputs = [constant([bound], f"bound_{index}") for index, bound in enumerate(bounds)]
        part = ir.Node("", "Slice", [node.inputs[0], *inputs], name=name)
    part.outputs[0].name = name
    return editor.insert(part).outputs[0]


def _replace_construct(editor: Editor, node: ir.Node) -> None:
    elements = [value for value in node.inputs if value is not None]
    concats = [user for user, _ in node.outputs[0].uses() if user.op_type == "ConcatFromSequence"]
    if concats and len(concats) == len(node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
        if not any(concat.attributes.get_int("new_axis", 0) for concat in concats):
            for old in concats:
                concat = ir.Node("", "Concat", elements, [_axis(old)], name=old.name)
                concat.outputs[0].name = f"{old.outputs[0].name}.joined"
                editor.before = old
                _replace_node(editor, old, editor.insert(concat).outputs[0])
            editor.graph.remove(node, safe=True)
    elif (positions := _positions_read(node)) is not None:
        count = len(elements)
        _replace_reads(editor, node, {index: elements[index] for index in range(-count, count)}, positions)


def _replace_reads(editor: Editor, node: ir.Node, elements: Elements, positions: dict[ir.Node, int]) -> None:
    """Replace the reads of a sequence by its elements, and remove the sequence."""
    if all(position in elements for position in positions.values()):
        for user, position in positions.items():
            _replace_node(editor, user, elements[position])
        editor.graph.remove(node, safe=True)


def _replace_node(editor: Editor, node: ir.Node, value: ir.Value) -> None:
    """Replace the output of a node by a value, and remove the node; an output of the graph keeps its name."""
    old = node.outputs[0]
    if old.is_graph_output():
        editor.before = node
        value = editor.insert(ir.Node("", "Identity", [value])).outputs[0]
        value.type, value.shape = old.type, old.shape
        editor.replace(old, value)
    else:
        old.replace_all_uses_with(value)
    editor.graph.remove(node, safe=True)


def _axis(node: ir.Node) -> ir.Attr:
    return ir.AttrInt64("axis", node.attributes.get_int("axis", 0))
