"""Compute the cache of a prompt in a second model, without logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.io.locate import PREFILL_FILE
from kvsurgeon.passes.contract import Changed, Companion, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_removal import remove_cache


@dataclass(frozen=True, kw_only=True)
class SeparatePrefill:
    """Write a second model, `prefill.onnx`, that computes the cache of a prompt and no logits.

    The model itself is unchanged. `prefill.onnx` has the same inputs, the cache outputs alone, and only the nodes that
    these need. It takes all tokens of a prompt but the last; the model then takes the last one and each new one. After
    `swiftkv`, the second model has no layers behind the one whose input they share.

    Not supported: a model without a cache.
    """

    name: ClassVar[str] = "separate-prefill"

    def apply(self, subject: Subject) -> Outcome:
        """Extract the second model from `subject.model`.

        Raises:
            UnsupportedError: The model has no cache, or it cannot be read.
        """
        with deep_recursion():
            removed = remove_cache(subject.model)
        if removed is None:
            raise UnsupportedError(
                "the model has no cache", code=Code.PASS_PRECONDITION, hint="run inject before this pass"
            )
        presents = {entry.present for entry in removed.signature.entries}
        companion = copy_model(subject.model)
        graph = companion.graph
        kept = [value for value in graph.outputs if value.name in presents]
        if len(kept) == len(graph.outputs):
            return Unchanged(reason="the model has no outputs besides its cache")
        graph.outputs.clear()
        graph.outputs.extend(kept)
        editor = Editor(companion)
        editor.finish()
        return Changed(edits=editor.edits, companions={PREFILL_FILE: Companion(model=companion, connections={})})
