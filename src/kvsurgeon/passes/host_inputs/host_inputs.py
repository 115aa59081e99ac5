"""Turn masks and position tables into inputs, which the application computes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.host_inputs.boundary import find_boundary, token_and_cache_inputs
from kvsurgeon.passes.host_inputs.describe import describe, has_equal_halves, hidden_value, hides_later_keys
from kvsurgeon.passes.host_inputs.tabulate import ContextTable, can_run, open_context, tabulate
from kvsurgeon.passes.options import check_count
from kvsurgeon.rewrite.cache_metadata import CONTEXT_KEY

DEFAULT_LENGTH = 512
MIN_LENGTH = 32  # positions that are needed to tell one kind of context from another
MAX_LENGTH = 32_768  # a mask table has as many rows and columns
NEW, TOTAL = "sequence_length", "total_sequence_length"
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


@dataclass(frozen=True, kw_only=True)
class HostInputs:
    """Turn masks and position tables into inputs, which the application computes.

    Before: a new-tokens cache, with an attention mask of 0 and 1, and positions that are computed or given. After:
    `attention_mask [1, 1, sequence_length, total_sequence_length]` is added to the scores, `position_ids_cos` and
    `position_ids_sin [1, 1, sequence_length, head_dim / 2]` are rotary tables, and all other context that depends on
    positions only is an input too. The metadata key `kvsurgeon.context` describes these inputs for sequences of up to
    `max_length` tokens. Batches above one and left padding are not supported afterwards: the application masks the
    unfilled rows of the cache.

    Not handled: context that depends on more than the positions of queries and keys.

    Attributes:
        max_length: Maximum number of tokens, if the tables of the model have as many rows; none is 512.
    """

    name: ClassVar[str] = "host-inputs"

    max_length: int | None = None

    def __post_init__(self) -> None:
        check_count("max-length", self.max_length, most=MAX_LENGTH)

    def apply(self, subject: Subject) -> Outcome:
        """Replace the context of `subject.model` by inputs.

        Raises:
            UnsupportedError: It cannot be computed from positions; the model is unchanged.
        """
        model = copy_model(subject.model)
        tokens, caches = token_and_cache_inputs(model.graph)
        boundary = find_boundary(model.graph, tokens, caches)
        if not boundary:
            return Unchanged(reason="nothing in the graph depends on masks or positions")
        run = open_context(model.graph, boundary, tokens, caches)
        length = max(MIN_LENGTH, self.max_length or DEFAULT_LENGTH)
        while length >= 2 * MIN_LENGTH and not can_run(run, length):
            length //= 2
        contexts = tabulate(run, boundary, length)
        replaced = [value for value in model.graph.inputs if value not in {tokens, *caches}]
        editor = Editor(model)
        descriptions = _add_inputs(editor, contexts)
        editor.finish()
        _remove_inputs(model.graph, replaced)
        model.metadata_props[CONTEXT_KEY] = json.dumps({"places": length, "inputs": descriptions})
        subject.model = model
        return Changed(edits=editor.edits)


def _remove_inputs(graph: ir.Graph, inputs: Sequence[ir.Value]) -> None:
    """Remove the inputs from which the context was computed.

    Raises:
        UnsupportedError: One is read elsewhere.
    """
    live = find_live(graph)
    for value in inputs:
        if value in live:
            raise UnsupportedError(
                "a mask or position is read by more than context", code=Code.PASS_PRECONDITION, at=value.name
            )
        graph.inputs.remove(value)


def _add_inputs(editor: Editor, contexts: Sequence[ContextTable]) -> dict[str, Any]:
    """Replace each value by an input, equal ones by the same, and return the descriptions of the inputs."""
    is_hidden = any(map(hides_later_keys, contexts))
    inputs: dict[tuple[str, str, bytes], ir.Value] = {}
    descriptions: dict[str, Any] = {}
    names: Counter[str] = Counter()
    for context in contexts:
        key = (context.kind, str(context.table.dtype), context.table.tobytes())
        if key not in inputs:
            name = _name(context)
            names[name] += 1
            name = name if names[name] == 1 else f"{name}_{names[name]}"
            descriptions[name] = describe(context, hidden_elsewhere=is_hidden)
            inputs[key] = _converted(editor, context, _add_input(editor, context, name))
        context.value.replace_all_uses_with(_reshaped(editor, context, inputs[key]))
    return descriptions


def _name(context: ContextTable) -> str:
    if context.kind == "mask":
        return "attention_mask"
    if context.kind == "rows" and context.table.ndim == 1:
        return "position_ids"
    if context.kind == "rows" and np.ptp(context.table[0]) == 0:
        return "position_ids_cos" if context.table[0, 0] else "position_ids_sin"
    return "context"


def _add_input(editor: Editor, context: ContextTable, name: str) -> ir.Value:
    """Add an input, int32 or float32 of rank 4."""
    shape: list[int | str] = [1, _heads(context), NEW if context.kind == "mask" else 1, TOTAL]
    if context.kind == "rows":
        features = 1 if context.table.ndim == 1 else context.table.shape[1] // (1 + has_equal_halves(context))
        shape = [1, 1, NEW, features]
    dtype = INT32 if np.issubdtype(context.table.dtype, np.integer) else FLOAT
    editor.release_name(name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    editor.graph.inputs.append(value)
    return value


def _converted(editor: Editor, context: ContextTable, given: ir.Value) -> ir.Value:
    """Return an input with all features of the context, in its type."""
    value = given
    if has_equal_halves(context):
        value = editor.node("Concat", [value, value], {"axis": 3}, name=f"{given.name}.twice", dtype=FLOAT)
    if context.table.dtype == bool:
        operator = "Less" if hidden_value(context) else "Greater"
        threshold = editor.constant(-1.0, np.float32, name="hidden")
        return editor.node(operator, [value, threshold], name=f"{given.name}.truth", dtype=ir.DataType.BOOL)
    dtype = ir.DataType.from_numpy(context.table.dtype)
    if dtype is value.dtype:
        return value
    return editor.node("Cast", [value], {"to": int(dtype)}, name=f"{given.name}.cast", dtype=dtype)


def _reshaped(editor: Editor, context: ContextTable, value: ir.Value) -> ir.Value:
    """Return the value with the axes of the context."""
    kept = {"mask": {2, 3}, "columns": {3}, "rows": {2}}[context.kind]
    if context.kind == "rows" and context.table.ndim == 2:
        kept.add(3)
    if _heads(context) > 1:
        kept.add(1)
    name = f"{value.name}.as_before"
    axes = editor.constant([axis for axis in range(4) if axis not in kept], name="axes")
    value = editor.node("Squeeze", [value, axes], name=name, dtype=value.dtype)
    if not context.unit_axes:
        return value
    axes = editor.constant(list(context.unit_axes), name="axes")
    return editor.node("Unsqueeze", [value, axes], name=name, dtype=value.dtype)


def _heads(context: ContextTable) -> int:
    """Return the number of heads with different numbers."""
    rank = {"mask": 3, "columns": 2}.get(context.kind)
    return int(context.table.shape[0]) if context.table.ndim == rank else 1
