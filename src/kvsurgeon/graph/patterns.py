"""Local rewrites: a pattern looks at one node and says what replaces its output; the driver does the rest.

All nodes are matched before the first edit: an error in a pattern leaves the model unchanged, and the nodes that a
replacement adds are not matched again. Dead code is removed at the end.

    def div(node: ir.Node) -> Replacement | None:
        reciprocal = producer_of(node.inputs[1], "Reciprocal") if is_operator(node, "Mul") else None
        if reciprocal is None:
            return None
        return Replacement(
            value=node.outputs[0],
            build=lambda editor: editor.node(
                "Div", [node.inputs[0], reciprocal.inputs[0]], name=f"{node.outputs[0].name}.quotient", like=node
            ),
        )

    edits = rewrite(model, div)  # 0 if the model has none
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """A replacement of a value.

    Attributes:
        value: The value to replace.
        build: Adds nodes and returns the new value, which may exist already. It must read the inputs of nodes when it
            is called, since an earlier replacement may have changed them.
        keep_name: Whether the new value takes over the name of the old one, and its place as a graph output.
        uses: The uses to replace, as `(node, input index)`; all if None.
    """

    value: ir.Value
    build: Callable[[Editor], ir.Value]
    keep_name: bool = True
    uses: Sequence[tuple[ir.Node, int]] | None = None


Pattern = Callable[[ir.Node], Replacement | None]


def rewrite(model: ir.Model, pattern: Pattern) -> int:
    """Replace every match of a pattern in the main graph, and return the number of edits: 0 without a match.

    An unknown type or shape of the new value is copied from the old one.
    """
    matches = [match for node in model.graph if (match := pattern(node)) is not None]
    if not matches:
        return 0
    editor = Editor(model)
    for match in matches:
        _replace(editor, match)
    editor.finish()
    return editor.edits


def _replace(editor: Editor, match: Replacement) -> None:
    old, new = match.value, match.build(editor)
    new.type, new.shape = new.type or old.type, new.shape or old.shape
    if match.uses is not None:
        for node, index in match.uses:
            editor.replace_input(node, index, new)
    elif match.keep_name:
        editor.replace(old, new)
    else:
        old.replace_all_uses_with(new)
        editor.edits += 1
