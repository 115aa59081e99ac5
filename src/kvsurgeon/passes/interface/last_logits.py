"""Compute the logits of the last real token only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import chain
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.interface.past_length_from_positions import POSITIONS

# Operators after the last layer that keep tokens apart: the LM head, its bias, a scale, a softcap.
_TOKENWISE = ("MatMul", "Add", "Mul", "Div", "Tanh", "Cast", "MatMulNBits", "Identity")


@dataclass(frozen=True, kw_only=True)
class LastLogits:
    """Compute the logits of one token only, the one with the highest of `position_ids`.

    Before: `logits [batch_size, sequence_length, vocabulary]`. After: `[batch_size, 1, vocabulary]`, and the LM head
    multiplies the features of one token.

    Not handled: batches above one; a model without `position_ids`.
    """

    name: ClassVar[str] = "last-logits"

    def apply(self, subject: Subject) -> Outcome:
        """Reduce the logits of `subject.model`.

        Raises:
            UnsupportedError: The model has no position_ids or no logits, or a batch above one.
        """
        graph = subject.model.graph
        positions = next((value for value in graph.inputs if value.name == POSITIONS), None)
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if positions is None or logits is None:
            raise UnsupportedError(
                f"the last token cannot be found without {POSITIONS} and logits", code=Code.PASS_PRECONDITION,
                hint="run past-length-from-positions first",
            )  # fmt: skip
        if logits.shape is None or len(logits.shape) != 3:
            raise UnsupportedError(
                "the logits have an unknown layout", code=Code.PASS_PRECONDITION, at="logits",
                expected="[batch, sequence, vocabulary]", found=str(logits.shape),
            )  # fmt: skip
        if logits.shape[1] == 1:
            return Unchanged(reason="the model returns the logits of one token")
        if positions.shape is None or positions.shape[0] != 1:
            raise UnsupportedError(
                "the sequences of a batch have different last tokens", code=Code.PASS_PRECONDITION, at=POSITIONS,
                expected="a batch of 1", found=str(positions.shape),
            )  # fmt: skip
        editor = Editor(subject.model)
        place = editor.node(
            "ArgMax", [positions], {"axis": 1, "keepdims": 0}, name="last_place", dtype=ir.DataType.INT64, shape=[1]
        )
        _select(editor, logits, place)
        editor.finish()
        return Changed(edits=editor.edits)


def _select(editor: Editor, logits: ir.Value, place: ir.Value) -> None:
    """Select one token before the LM head."""
    hidden, later = _before_lm_head(logits)
    uses = () if hidden is logits else tuple(hidden.uses())
    last = editor.node("Gather", [hidden, place], {"axis": 1}, name=f"{hidden.name}.last", dtype=hidden.dtype)
    for user, index in uses:
        editor.replace_input(user, index, last)
    last.shape = hidden.shape
    if hidden is logits:
        editor.graph.outputs[list(editor.graph.outputs).index(logits)] = last
        logits.name, last.name = editor.unique_name("logits.all"), "logits"
    for value in (last, *later):
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], 1, *value.shape[2:]])


def _before_lm_head(logits: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
    """Return the first value from which the logits are computed token by token, and the values after it."""
    if logits.uses():
        return logits, []
    *later, hidden = chain(logits, _token_input)
    return hidden, later


def _token_input(node: ir.Node) -> ir.Value | None:
    """Return the input whose tokens a node keeps apart, if nothing else reads it and all others are constants."""
    if node.op_type not in _TOKENWISE:
        return None
    tokens = [value for value in node.inputs if value is not None and constant_tensor(value) is None]
    ranks = [len(tensor.shape) for value in node.inputs if (tensor := constant_tensor(value)) is not None]
    max_rank = 3 if has_trait(node, Trait.PACKED_WEIGHTS) else 2 if has_trait(node, Trait.PRODUCT) else 1
    if len(tokens) != 1 or max(ranks, default=0) > max_rank or (node.inputs[0] is not tokens[0] and max_rank > 1):
        return None
    return None if tokens[0].is_graph_output() or len(list(tokens[0].uses())) != 1 else tokens[0]
