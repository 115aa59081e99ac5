"""Add an input of positions to a model that computes positions from the length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.cache.signature import CacheSignature
from kvsurgeon.dataflow.input_dimensions import declared_dimensions
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.ops.content import depends_on_input
from kvsurgeon.passes.cache.dynamic_length import with_dynamic_length
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.proof.proof import prove
from kvsurgeon.rewrite.by_sequence.given_positions import (
    GivenPositions,
    context_of_new_tokens,
    shape_of_tokens,
)


@dataclass(frozen=True, kw_only=True)
class AddPositionIds:
    """Add an input of positions to a model that computes them from the length, so that it supports left padding.

    Before: the position of token `i` is `i`. After: it is `position_ids[batch, i]`, for embeddings and rotary angles.
    Unchanged: masks, biases that depend on the distance of two tokens, and positions computed from `attention_mask`. A
    cache is removed first and restored afterwards.

    An export of fixed length takes any number of tokens up to that length afterwards.

    Attributes:
        input: Name of the new input, int64 `[batch, length]`.
    """

    name: ClassVar[str] = "add-position-ids"

    input: str = "position_ids"

    def apply(self, subject: Subject) -> Outcome:
        """Add the input to `subject.model`.

        Raises:
            UnsupportedError: The model is not a supported decoder, or has a cache that cannot be restored; it is
                unchanged.
        """
        if any(value.name == self.input for value in subject.model.graph.inputs):
            return Unchanged(reason=f"the model has an input `{self.input}`")
        work = subject.with_model(subject.model)
        signature = detach_cache(work)
        if isinstance(declared_dimensions(work.model.graph)[1], int):
            work = with_dynamic_length(work)
        model = simplify_model(work.model)
        with deep_recursion():
            analysis = analyze(model)
            prove(analysis)
            edits = _add_positions(analysis, self.input)
        if not edits:
            return Unchanged(reason="only masks and biases by distance depend on positions")
        work.model = model
        if signature is not None:
            reattach_cache(work, _with_input(signature, self.input))
        subject.model = work.model
        return Changed(edits=edits)


def _with_input(signature: CacheSignature, name: str) -> CacheSignature:
    """Return a signature with one more input before the cache inputs."""
    pasts = {entry.past for entry in signature.entries}
    first = next(index for index, past in enumerate(signature.inputs) if past in pasts)
    return replace(signature, inputs=(*signature.inputs[:first], name, *signature.inputs[first:]))


def _add_positions(analysis: Analysis, name: str) -> int:
    """Add the input, and return the number of edits; 0 if nothing depends on positions."""
    editor = Editor(analysis.model)
    editor.release_name(name)
    positions = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=shape_of_tokens(analysis))
    found = context_of_new_tokens(analysis, masks=False)
    uses = [use for use in found if not depends_on_input(use[0].inputs[use[1]])]  # type: ignore[arg-type]
    if not uses:
        return 0
    given = GivenPositions(analysis, editor, positions)
    for node, index, axis in uses:
        editor.replace_input(node, index, given.at_tokens(node, index, axis))
    analysis.model.graph.inputs.append(positions)
    editor.finish()
    return editor.edits
