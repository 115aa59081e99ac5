"""Add an input for a causal mask of queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import required_inputs, shapes_of
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.query import is_operator
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.ops.content import depends_on_input
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.host_inputs.boundary import find_context


@dataclass(frozen=True, kw_only=True)
class AddCausalMaskInput:
    """Add an input `causal_mask` to a model with a cache, which some runtimes require for chunked prefill.

    Before: `attention_mask [batch_size, total_sequence_length]` marks the tokens that count. After: in addition,
    `causal_mask [batch_size, 1, sequence_length, total_sequence_length]`, 1 if a query attends to a key, is as long as
    the attention mask, which for a static cache is its capacity. A token counts if the attention mask marks it and the
    last query attends to it. The graph still hides later keys from every query: what it adds to scores or selects them
    by is computed as before, and multiplied with ones that are computed from the new input. DeepSparse reads context
    that it can compute in advance from the wrong end if its internal cache is not full.

    Not handled: masks other than causal ones with padding, as only the last row is read; models without an integer
    mask.

    Attributes:
        input: Name of the input.
        mask: Name of the attention mask.
    """

    name: ClassVar[str] = "add-causal-mask-input"

    input: str = "causal_mask"
    mask: str = "attention_mask"

    def apply(self, subject: Subject) -> Outcome:
        """Add the input to `subject.model`."""
        graph, int64 = subject.model.graph, ir.DataType.INT64
        inputs = {value.name: value for value in graph.inputs}
        mask = inputs.get(self.mask)
        if self.input in inputs:
            return Unchanged(reason=f"the model has an input `{self.input}`")
        if mask is None or len(mask.shape or ()) != 2 or mask.dtype is None or not mask.dtype.is_integer():
            return Unchanged(reason=f"the model has no integer input `{self.mask}` of rank 2")
        uses = list(mask.uses())
        if not uses:
            return Unchanged(reason=f"nothing reads `{self.mask}`")
        constant = _constant_context(graph)
        editor = Editor(subject.model)
        editor.release_name(self.input)
        assert mask.shape is not None
        shape = ir.Shape((mask.shape[0], 1, "sequence_length", mask.shape[1]))
        causal = ir.Value(name=self.input, type=ir.TensorType(int64), shape=shape)
        graph.inputs.append(causal)
        last = editor.node("Gather", [causal, editor.constant(-1)], {"axis": 2}, name="last_query", dtype=int64)
        visible = editor.node("Squeeze", [last, editor.constant([1])], name="seen_by_last", dtype=int64)
        if mask.dtype != int64:
            visible = editor.node("Cast", [visible], {"to": mask.dtype}, name="seen_by_last", dtype=mask.dtype)
        counted = editor.node("Mul", [mask, visible], name="counted", dtype=mask.dtype, shape=mask.shape)
        for node, index in uses:
            editor.replace_input(node, index, counted)
        _make_variable(editor, constant, causal)
        editor.finish()
        return Changed(edits=editor.edits)


def _constant_context(graph: ir.Graph) -> list[tuple[ir.Node, int, ir.DataType]]:
    """Return where scores are combined with context that follows from the lengths, with the type of that context."""
    inputs = required_inputs(graph)
    caches = [value for value in inputs if len(value.shape or ()) == 4]
    if not caches:
        return []
    with deep_recursion():
        shapes = shapes_of(graph)
        return [
            (node, index, dtype)
            for value in find_context(graph, inputs[0], caches)
            for node, index in value.uses()
            if (is_operator(node, "Add") or (is_operator(node, "Where") and index == 0))
            if len(shapes[node.outputs[0]].shape or ()) == 4 and _becomes_weights(node.outputs[0])
            if (dtype := shapes[value].dtype) is not None and not depends_on_input(value)
        ]


def _becomes_weights(value: ir.Value) -> bool:
    """Return whether a softmax reads a value after operators that leave every element at its place."""
    users = [node for node, _ in value.uses()]
    return any(
        has_trait(node, Trait.SOFTMAX)
        or (has_trait(node, Trait.BROADCAST, Trait.IDENTITY) and _becomes_weights(node.outputs[0]))
        for node in users
    )


def _make_variable(editor: Editor, uses: Sequence[tuple[ir.Node, int, ir.DataType]], causal: ir.Value) -> None:
    """Multiply context with ones that no compiler can compute in advance."""
    made: dict[ir.Value, ir.Value] = {}
    op = NodeBuilder(editor, "context")
    for node, index, dtype in uses:
        value = node.inputs[index]
        assert value is not None
        if value not in made:
            number = ir.DataType.FLOAT if dtype is ir.DataType.BOOL else dtype
            ones = op.Max(op.Cast(causal, to=int(number)), op.number(1.0, number))
            factor = op.Cast(value, to=int(number)) if dtype is not number else value
            product = op.Mul(factor, ones)
            made[value] = op.Cast(product, to=int(dtype)) if dtype is not number else product
        editor.replace_input(node, index, made[value])
