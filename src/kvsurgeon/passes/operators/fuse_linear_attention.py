"""Replace recurrences over chunks of tokens by one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import SequenceState, TokenFlow
from kvsurgeon.fusion.linear_recurrence import LinearRecurrence, find_linear_recurrence
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class FuseLinearAttention:
    """Replace recurrences over chunks of tokens, as of Mamba-2, by `LinearAttention` of com.microsoft.

    Before: a recurrence that pads a call to whole chunks, and computes a whole chunk for one token. After: one
    operator, whose CPU kernel takes the tokens of the call one after the other, with a state `[batch, heads, key_dim,
    value_dim]`. Results are compared on probe inputs. Run it before `inject`, which gives the operator past and
    present.

    Not handled: other types than float32, a decay for each feature, states that are also multiplied by keys.
    """

    name: ClassVar[str] = "fuse-linear-attention"

    def apply(self, subject: Subject) -> Outcome:
        """Fuse the recurrences of `subject.model`.

        Raises:
            UnsupportedError: The model is not a decoder without a cache.
        """
        work = subject.with_model(copy_model(subject.model))
        with deep_recursion():
            analysis = work.analysis()
            states = analysis.flow.recurrences
            found = [(state, find_linear_recurrence(analysis, state, recurrent)) for state, recurrent in states]
        fused = [(state, form) for state, form in found if form is not None]
        if not fused:
            return Unchanged(reason="the model has no recurrence over chunks with one decay for each head, in float32")
        editor = Editor(analysis.model)
        for state, form in fused:
            _fuse(editor, analysis.flow, state, form)
        editor.finish()
        work.model = analysis.model
        work.changed()
        subject.become(work)
        left = len(found) - len(fused)
        return Changed(edits=editor.edits, notes=(f"{left} recurrences are left as they are",) if left else ())


def _fuse(editor: Editor, flow: TokenFlow, state: SequenceState, form: LinearRecurrence) -> None:
    heads, key_dim = (int(size) for size in (flow.shapes[form.key].shape or ())[2:])
    value_dim = int((flow.shapes[form.value].shape or ())[3])
    last, name = state.nodes[-1], state.result.name or "recurrence"
    editor.before = last
    joined = editor.constant([0, 0, -1], name="joined_heads")
    inputs: list[ir.Value | None] = [
        editor.node("Reshape", [value, joined], name=f"{value.name}.joined", dtype=ir.DataType.FLOAT)
        for value in (form.query, form.key, form.value)
    ]
    sizes = editor.node("Shape", [form.query], name=f"{name}.sizes", dtype=ir.DataType.INT64)
    batch = editor.node("Gather", [sizes, editor.constant([0], name="first")], name=f"{name}.batch")
    shape = editor.node(
        "Concat", [batch, editor.constant([heads, key_dim, value_dim], name="state")], {"axis": 0}, name=f"{name}.shape"
    )
    zeros = editor.node("Expand", [editor.constant(0.0, "float32", name="zero"), shape], name=f"{name}.before")
    rows, after = (ir.Value(name=editor.unique_name(f"{name}.{part}")) for part in ("rows", "after"))
    attributes = {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated", "scale": 1.0}
    inputs += [zeros, form.decay]
    editor.operator("com.microsoft", "LinearAttention", inputs, attributes, [rows, after], last)
    split = editor.constant([0, 0, heads, value_dim], name="split_heads")
    result = editor.node("Reshape", [rows, split], name=f"{name}.fused", dtype=ir.DataType.FLOAT)
    if form.added is not None:
        product = editor.node("Mul", list(form.added.factors), name=f"{name}.added", dtype=ir.DataType.FLOAT)
        result = editor.node("Add", [result, product], name=f"{name}.sum", dtype=ir.DataType.FLOAT)
    editor.replace(state.result, result)
