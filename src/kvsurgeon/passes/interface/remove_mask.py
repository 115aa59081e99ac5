"""Let a model with a cache count every token that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import is_given_for_new_tokens
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class RemoveMask:
    """Make the attention mask in the graph, as one that lets every token count, instead of taking it as an input.

    Before: `attention_mask [batch_size, max_length]` is given. After: it is ones, as many as the cache has rows. The
    result is that of a call without padding: tokens behind the real ones are hidden from these by causality, and
    padding on the left is not possible.

    Not handled: a mask as long as the tokens so far, which only a cache that is written in place has not.
    """

    name: ClassVar[str] = "remove-mask"

    def apply(self, subject: Subject) -> Outcome:
        """Take the mask input out of `subject.model`.

        Raises:
            UnsupportedError: It is no mask of whole numbers or truths, or it has no length that a cache has too.
        """
        graph = subject.model.graph
        inputs = [value for value in graph.inputs if not value.is_initializer()]
        caches = [value for value in inputs if len(value.shape or ()) == 4]
        masks = [value for value in inputs if len(value.shape or ()) == 2 and not is_given_for_new_tokens(value)]
        if not masks:
            return Unchanged(reason="no input is given for all tokens so far")
        sources = [_source(caches, mask) for mask in masks]
        editor = Editor(subject.model)
        for mask, cache in zip(masks, sources, strict=True):
            ones = _ones(editor, mask, cache)
            ones.shape = mask.shape
            mask.replace_all_uses_with(ones)
            graph.inputs.remove(mask)
        editor.finish()
        return Changed(edits=editor.edits)


def _source(caches: Sequence[ir.Value], mask: ir.Value) -> ir.Value:
    """Return an input of the cache that has as many rows as the mask has places.

    Raises:
        UnsupportedError: None has, or the mask holds no whole numbers or truths.
    """
    if mask.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        raise UnsupportedError(
            "what makes every token count is not known of this mask", at=mask.name, found=str(mask.dtype)
        )
    sizes = _sizes(mask)
    wanted = {sizes[1], *(size for size in sizes if isinstance(size, str))}
    found = next((cache for cache in caches if wanted <= set(_sizes(cache))), None)
    if found is None:
        raise UnsupportedError(
            "no cache is as long as the mask", at=mask.name, found=str(sizes[1]), hint="inject in place first"
        )
    return found


def _ones(editor: Editor, mask: ir.Value, cache: ir.Value) -> ir.Value:
    """Ones for every place of the mask: as many as the cache has rows, where that is no number."""
    assert mask.dtype is not None
    sizes = _sizes(mask)
    known = np.ones([size if isinstance(size, int) else 1 for size in sizes])
    one = editor.constant(known, mask.dtype.numpy(), name="counts")
    if all(isinstance(size, int) for size in sizes):
        return one
    shape = editor.node("Shape", [cache], name=f"{cache.name}_shape", dtype=ir.DataType.INT64)
    axes = [_sizes(cache).index(size) if isinstance(size, str) else None for size in sizes]
    parts = [
        editor.constant([size], name="size")
        if axis is None
        else editor.node("Gather", [shape, editor.constant([axis])], name="size", dtype=ir.DataType.INT64, shape=[1])
        for size, axis in zip(sizes, axes, strict=True)
    ]
    target = editor.node("Concat", parts, {"axis": 0}, name=f"{mask.name}_shape", dtype=ir.DataType.INT64, shape=[2])
    return editor.node("Expand", [one, target], name=f"{mask.name}.all", dtype=mask.dtype)


def _sizes(value: ir.Value) -> list[int | str | None]:
    return [size if isinstance(size, int) else size.value for size in value.shape or ()]
