"""Answer for the last real token alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.interface.past_length_from_positions import POSITIONS

# What comes behind the last layer, token by token: the head, its bias, a scale, a softcap.
_TOKENWISE = frozenset({"MatMul", "Add", "Mul", "Div", "Tanh", "Cast", "MatMulNBits", "Identity"})


@dataclass(frozen=True, kw_only=True)
class LastLogits:
    """Give the logits of one token only, the one with the highest of `position_ids`.

    Before: `logits [batch_size, sequence_length, vocabulary]`. After: `[batch_size, 1, vocabulary]`, and the head is
    multiplied with one token's features.

    Not handled: batches above one; a model without `position_ids`.
    """

    name: ClassVar[str] = "last-logits"

    def apply(self, subject: Subject) -> Outcome:
        """Cut the logits of `subject.model` down.

        Raises:
            UnsupportedError: It has no position_ids or no logits, or takes several texts at once.
        """
        graph = subject.model.graph
        positions = next((value for value in graph.inputs if value.name == POSITIONS), None)
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if positions is None or logits is None:
            raise UnsupportedError(
                f"the last token cannot be told without {POSITIONS} and logits", hint="past-length-from-positions first"
            )
        if logits.shape is None or len(logits.shape) != 3:
            raise UnsupportedError(
                "the logits do not lie as expected", at="logits", expected="[batch, sequence, vocabulary]"
            )
        if logits.shape[1] == 1:
            return Unchanged(reason="it answers for one token already")
        if positions.shape is None or positions.shape[0] != 1:
            raise UnsupportedError(
                "several texts have their last tokens in several places", at=POSITIONS, expected="a batch of 1"
            )
        editor = Editor(subject.model)
        place = editor.node(
            "ArgMax", [positions], {"axis": 1, "keepdims": 0}, name="last_place", dtype=ir.DataType.INT64, shape=[1]
        )
        self._pick(editor, logits, place)
        editor.finish()
        return Changed(edits=editor.edits)

    def _pick(self, editor: Editor, logits: ir.Value, place: ir.Value) -> None:
        hidden, behind = _before_the_head(logits)
        users = () if hidden is logits else tuple(hidden.uses())
        last = editor.node("Gather", [hidden, place], {"axis": 1}, name=f"{hidden.name}.last", dtype=hidden.dtype)
        for user, index in users:
            editor.replace_input(user, index, last)
        last.shape = hidden.shape
        if hidden is logits:
            editor.graph.outputs[list(editor.graph.outputs).index(logits)] = last
            logits.name, last.name = editor.unique_name("logits.all"), "logits"
        for value in (last, *behind):
            if value.shape is not None:
                value.shape = ir.Shape([value.shape[0], 1, *value.shape[2:]])


def _before_the_head(logits: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
    """The first value from which the logits are computed token by token, and the values behind it."""
    value, behind = logits, []
    if logits.uses():
        return logits, []
    while (node := value.producer()) is not None and (source := _tokens_of(node)) is not None:
        if source.is_graph_output() or len(list(source.uses())) != 1:
            break
        behind.append(value)
        value = source
    return value, behind


def _tokens_of(node: ir.Node) -> ir.Value | None:
    """The input whose tokens a node computes one by one, with constants that are the same for all of them."""
    if node.op_type not in _TOKENWISE:
        return None
    tokens = [value for value in node.inputs if value is not None and constant_tensor(value) is None]
    ranks = [len(tensor.shape) for value in node.inputs if (tensor := constant_tensor(value)) is not None]
    widest = 3 if node.op_type == "MatMulNBits" else 2 if node.op_type == "MatMul" else 1
    if len(tokens) != 1 or max(ranks, default=0) > widest:
        return None
    return tokens[0] if node.inputs[0] is tokens[0] or widest == 1 else None
