"""The LM head: the nodes after the last layer, in front of which tokens are selected."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import chain
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

LOGITS = "logits"

# Operators after the last layer that keep tokens apart: the LM head, its bias, a scale, a softcap.
_TOKENWISE = ("MatMul", "Add", "Mul", "Div", "Tanh", "Cast", "MatMulNBits", "Identity")


def find_logits(graph: ir.Graph) -> ir.Value:
    """Return the output `logits`, `[batch, sequence, vocabulary]`.

    Raises:
        UnsupportedError: There is none, or it has another layout.
    """
    logits = next((value for value in graph.outputs if value.name == LOGITS), None)
    if logits is None:
        raise UnsupportedError(
            f"the model has no output `{LOGITS}`", code=Code.PASS_PRECONDITION,
            found=", ".join(str(value.name) for value in graph.outputs), hint="rename it with rename-io",
        )  # fmt: skip
    if logits.shape is None or len(logits.shape) != 3:
        raise UnsupportedError(
            "the logits have an unknown layout", code=Code.PASS_PRECONDITION, at=LOGITS,
            expected="[batch, sequence, vocabulary]", found=str(logits.shape),
        )  # fmt: skip
    return logits


def select_tokens(editor: Editor, logits: ir.Value, select: Callable[[ir.Value], ir.Value], size: int | str) -> None:
    """Select tokens before the LM head.

    Args:
        editor: The editor of the model.
        logits: The output, `[batch, sequence, vocabulary]`.
        select: Returns the selected tokens of a value `[batch, sequence, ...]`.
        size: Their number: a number, or the name of a dimension.
    """
    hidden, later = _before_lm_head(logits)
    uses = () if hidden is logits else tuple(hidden.uses())
    selected = select(hidden)
    for user, index in uses:
        editor.replace_input(user, index, selected)
    selected.shape = hidden.shape
    if hidden is logits:
        editor.graph.outputs[list(editor.graph.outputs).index(logits)] = selected
        logits.name, selected.name = editor.unique_name(f"{LOGITS}.all"), LOGITS
    for value in (selected, *later):
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], size, *value.shape[2:]])


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
