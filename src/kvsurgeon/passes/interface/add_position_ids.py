"""Let a model that counts positions itself be told them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.cache.signature import CacheSignature
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.proof.proof import prove
from kvsurgeon.rewrite.given_positions import GivenPositions, at_tokens
from kvsurgeon.symbolic.sequence_axes import Length

Place = tuple[ir.Node, int, int]  # a node on tokens, the input that is context, the axis of it that holds tokens


@dataclass(frozen=True, kw_only=True)
class AddPositionIds:
    """Let a model that counts positions itself be told them: padding on the left then shifts nothing.

    Before: embeddings and rotary angles of token `i` are those of place `i`. After: they are those of
    `position_ids[batch, i]`. Masks, and biases that depend on the distance of two tokens, stay as they are, and so do
    positions that are counted from `attention_mask`. A cache is taken out for it, and put back.

    Not handled: exports of a fixed length.

    Attributes:
        input: Name of the new input, int64 `[batch, length]`.
    """

    name: ClassVar[str] = "add-position-ids"

    input: str = "position_ids"

    def apply(self, subject: Subject) -> Outcome:
        """Give `subject.model` the input.

        Raises:
            UnsupportedError: The model is no causal decoder that can be handled soundly, or has a cache that could
                not be put
                back; it is left as it was.
        """
        if any(value.name == self.input for value in subject.model.graph.inputs):
            return Unchanged(reason=f"it has an input `{self.input}`")
        work = Subject(model=subject.model, folder=subject.folder, config=subject.config)
        signature = detach_cache(work)
        model = simplify_model(work.model)
        with deep_recursion():
            analysis = analyze(model)
            prove(analysis)
            edits = _place(analysis, self.input)
        if not edits:
            return Unchanged(reason="nothing in it depends on the place of a token but masks and distances")
        work.model = model
        if signature is not None:
            reattach_cache(work, _with_input(signature, self.input))
        subject.model = work.model
        return Changed(edits=edits)


def _with_input(signature: CacheSignature, name: str) -> CacheSignature:
    """The signature of the same cache with one more input before it."""
    pasts = {entry.past for entry in signature.entries}
    first = next(place for place, past in enumerate(signature.inputs) if past in pasts)
    return replace(signature, inputs=(*signature.inputs[:first], name, *signature.inputs[first:]))


def _place(analysis: Analysis, name: str) -> int:
    """Return the number of edits; none where there is nothing to be placed."""
    if isinstance(analysis.length, int):
        raise UnsupportedError(
            "positions are folded into an export of fixed length", found=f"length {analysis.length}",
            hint="export with dynamic axes",
        )  # fmt: skip
    editor = Editor(analysis.model)
    tokens = next(given.value for given in analysis.inputs if given.is_token)
    editor.release_name(name)
    positions = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=_shape_of(analysis, tokens))
    placing = GivenPositions(analysis.flow, editor, positions)
    places = [place for place in _places(analysis) if not placing.follows_input(place[0].inputs[place[1]])]  # type: ignore[arg-type]
    for node, index, axis in places:
        editor.replace_input(node, index, at_tokens(placing, node, index, axis))
    if places:
        analysis.model.graph.inputs.append(positions)
        editor.finish()
    return editor.edits if places else 0


def _shape_of(analysis: Analysis, tokens: ir.Value) -> ir.Shape:
    """Return `[batch, length]`, as the tokens spell it."""
    given = next(given for given in analysis.inputs if given.value is tokens)
    (length,) = given.lengths
    sizes = list(tokens.shape or ())
    batch = next((size for axis, size in enumerate(sizes[:length]) if axis not in given.lengths), 1)
    return ir.Shape([batch, sizes[length]])


def _places(analysis: Analysis) -> list[Place]:
    """Where context with a row for each new token meets tokens outside attention."""
    flow = analysis.flow
    inside = {node for head in analysis.sites for node in head.upstream_of_weights() | head.ends}
    found = []
    for (node, index), axes in flow.demands.items():
        value = node.inputs[index]
        if node in inside or value is None or flow.kinds.get(value) is not ValueKind.CONTEXT:
            continue
        if flow.targets.get(node) == index or (node, index) in flow.parameters or len(axes) != 1:
            continue
        (axis,) = axes
        if axis.variable.resolved() is Length.NEW and axis.is_plain:
            found.append((node, index, axis.axis))
    return found
