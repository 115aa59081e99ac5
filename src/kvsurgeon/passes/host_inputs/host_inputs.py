"""Let the host give what a graph makes of masks and positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.host_inputs.boundary import find_frontier, text_and_cache
from kvsurgeon.passes.host_inputs.describe import halves, hides, is_hiding, told
from kvsurgeon.passes.host_inputs.tabulate import Context, Laboratory, measure
from kvsurgeon.passes.options import check_count

KEY = "kvsurgeon.context"  # of what hosts are told, in the file's metadata

USUAL = 512  # places that are measured where nobody asks for a number
FEWEST = 32  # places at which what is measured tells one kind of context from another
MOST_PLACES = 32_768  # a table of masks has as many rows, and as many columns
NEW, TOTAL = "sequence_length", "total_sequence_length"
FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


@dataclass(frozen=True, kw_only=True)
class HostInputs:
    """Take masks and positions as the numbers that the graph made of them, instead of making these.

    Before: a cache of which new rows come out, with an attention mask of 0 and 1, and positions that are counted or
    given. After: `attention_mask [1, 1, sequence_length, total_sequence_length]` is added to scores, and
    `position_ids_cos` and `position_ids_sin [1, 1, sequence_length, head_dim / 2]` are rotary tables. Whatever else
    depends on places alone is given likewise. What a host must give for texts of up to `max_length` tokens is noted in
    the file's metadata. Batches above one and padding on the left are gone: a host hides rows that it has not filled.

    Not handled: context that depends on more than the places of queries and keys.

    Attributes:
        max_length: Tokens that a text has at most, if the graph has rows for so many. None asks for 512.
    """

    name: ClassVar[str] = "host-inputs"

    max_length: int | None = None

    def __post_init__(self) -> None:
        check_count("max-length", self.max_length, most=MOST_PLACES)

    def apply(self, subject: Subject) -> Outcome:
        """Replace the context of `subject.model` by inputs.

        Raises:
            UnsupportedError: It cannot be given; the model is left as it was.
        """
        model = subject.model.clone()
        model.meta.update(subject.model.meta)
        graph = model.graph
        text, cache = text_and_cache(graph)
        frontier = find_frontier(graph)
        if not frontier:
            return Unchanged(reason="nothing in it depends on masks or positions")
        places, contexts = self._measured(Laboratory(graph, frontier, text, cache))
        editor = Editor(model)
        notes = _Giving(editor, hidden=any(is_hiding(context) for context in contexts)).give(contexts)
        self._forget(editor, text, cache)
        model.metadata_props[KEY] = json.dumps({"places": places, "inputs": notes})
        subject.model = model
        return Changed(edits=editor.edits)

    def _measured(self, laboratory: Laboratory) -> tuple[int, list[Context]]:
        """What the host must give, for as many places as are wanted, or as the graph has rows for.

        Raises:
            UnsupportedError: Context cannot be run at all, or depends on more than places.
        """
        places = max(FEWEST, USUAL if self.max_length is None else self.max_length)
        while places >= 2 * FEWEST and not laboratory.can_run((0, places)):
            places //= 2
        return places, measure(laboratory, places)

    def _forget(self, editor: Editor, text: ir.Value, cache: Sequence[ir.Value]) -> None:
        """Take out the inputs that the context was made of.

        Raises:
            UnsupportedError: One of them is needed still.
        """
        graph, made = editor.graph, {text, *cache}
        editor.finish()
        alive = find_live(graph)
        for value in list(graph.inputs):
            if value in made or value.metadata_props.pop(_GIVEN, ""):
                continue
            if value in alive:
                raise UnsupportedError("a mask or position is needed for more than can be given", at=value.name)
            graph.inputs.remove(value)


_GIVEN = "kvsurgeon.given"  # marks an input for as long as the pass runs


class _Giving:
    """Adds the inputs, and lets the graph read them."""

    def __init__(self, editor: Editor, *, hidden: bool) -> None:
        self.editor = editor
        self.hidden = hidden  # whether a mask leaves later keys no weight
        self.count: dict[str, int] = {}
        self.made: dict[tuple[str, str, bytes], ir.Value] = {}
        self.notes: dict[str, object] = {}

    def give(self, contexts: Sequence[Context]) -> dict[str, object]:
        """Replace each value; those that hold the same numbers are one input. Return what hosts are told."""
        for context in contexts:
            key = (context.kind, str(context.table.dtype), context.table.tobytes())
            if key not in self.made:
                self.made[key] = self._input(context)
            context.value.replace_all_uses_with(self._arranged(context, self.made[key]))
        return self.notes

    def _input(self, context: Context) -> ir.Value:
        """A new input, and its numbers in the type and with all the features of the value."""
        heads = _heads(context)
        counts = context.kind == "rows" and context.table.ndim == 1
        name = self._name(context, counts=counts)
        self.notes[name] = told(context, hidden_elsewhere=self.hidden)
        shape: list[int | str] = [1, heads, NEW if context.kind == "mask" else 1, TOTAL]
        if context.kind == "rows":
            width = 1 if counts else context.table.shape[1] // (2 if halves(context) else 1)
            shape = [1, 1, NEW, width]
        whole = np.issubdtype(context.table.dtype, np.integer)
        self.editor.release_name(name)
        given = ir.Value(name=name, type=ir.TensorType(INT32 if whole else FLOAT), shape=ir.Shape(shape))
        given.metadata_props[_GIVEN] = "yes"
        self.editor.graph.inputs.append(given)
        return self._typed(context, given)

    def _typed(self, context: Context, given: ir.Value) -> ir.Value:
        value = given
        if halves(context):
            value = self.editor.node("Concat", [value, value], {"axis": 3}, name=f"{given.name}.twice", dtype=FLOAT)
        if context.table.dtype == bool:
            operator = "Less" if hides(context) else "Greater"
            half = self.editor.constant(-1.0, np.float32, name="hidden")
            return self.editor.node(operator, [value, half], name=f"{given.name}.truth", dtype=ir.DataType.BOOL)
        dtype = ir.DataType.from_numpy(context.table.dtype)
        if dtype is value.dtype:
            return value
        return self.editor.node("Cast", [value], {"to": int(dtype)}, name=f"{given.name}.cast", dtype=dtype)

    def _arranged(self, context: Context, value: ir.Value) -> ir.Value:
        """The numbers with the axes of the value that they replace."""
        kept = {"mask": {2, 3}, "columns": {3}, "rows": {2}}[context.kind]
        if context.kind == "rows" and context.table.ndim == 2:
            kept.add(3)
        if _heads(context) > 1:
            kept.add(1)
        name = f"{value.name}.as_before"
        gone = self.editor.constant([axis for axis in range(4) if axis not in kept], name="axes")
        value = self.editor.node("Squeeze", [value, gone], name=name, dtype=value.dtype)
        if not context.ones:
            return value
        return self.editor.node(
            "Unsqueeze", [value, self.editor.constant(list(context.ones), name="axes")], name=name, dtype=value.dtype
        )

    def _name(self, context: Context, *, counts: bool) -> str:
        name = "context"
        if context.kind == "mask":
            name = "attention_mask"
        elif counts:
            name = "position_ids"
        elif context.kind == "rows" and np.ptp(context.table[0]) == 0:
            name = "position_ids_cos" if context.table[0, 0] else "position_ids_sin"
        self.count[name] = self.count.get(name, 0) + 1
        return name if self.count[name] == 1 else f"{name}_{self.count[name]}"


def _heads(context: Context) -> int:
    """Heads that have numbers of their own."""
    rank = {"mask": 3, "columns": 2}.get(context.kind)
    return int(context.table.shape[0]) if context.table.ndim == rank else 1
