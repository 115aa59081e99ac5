"""Remove the attention mask input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.dataflow.input_dimensions import required_inputs
from kvsurgeon.dataflow.input_roles import is_given_for_new_tokens
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class RemoveMask:
    """Replace the attention mask input by a mask of ones in the graph.

    Before: an input `attention_mask [batch_size, max_length]`. After: ones, one for each row of the cache; without a
    cache, one for each token. The result is that of a call without padding: causality hides tokens after the real ones,
    and left padding is not possible.

    Not handled: a mask of past and new tokens, which only a static cache does not have.
    """

    name: ClassVar[str] = "remove-mask"

    def apply(self, subject: Subject) -> Outcome:
        """Remove the mask input of `subject.model`.

        Raises:
            UnsupportedError: The mask is no integer or boolean tensor, or no cache or token input has its length.
        """
        graph = subject.model.graph
        inputs = required_inputs(graph)
        caches = [value for value in inputs if len(value.shape or ()) == 4]
        tokens = [value for value in inputs if is_given_for_new_tokens(value)]
        masks = [value for value in inputs if len(value.shape or ()) == 2 and not is_given_for_new_tokens(value)]
        if not masks:
            return Unchanged(reason="the model has no attention mask input")
        sources = [_source(caches or tokens, mask) for mask in masks]
        editor = Editor(subject.model)
        for mask, source in zip(masks, sources, strict=True):
            ones = _ones(editor, mask, source)
            ones.shape = mask.shape
            mask.replace_all_uses_with(ones)
            graph.inputs.remove(mask)
        editor.finish()
        return Changed(edits=editor.edits)


def _source(inputs: Sequence[ir.Value], mask: ir.Value) -> ir.Value:
    """Return an input that has the dynamic sizes of the mask and its length: that of a cache, or of tokens.

    Raises:
        UnsupportedError: None has, or the mask is no integer or boolean tensor.
    """
    if mask.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        raise UnsupportedError(
            "the attention mask has an unknown meaning", code=Code.PASS_PRECONDITION, at=mask.name,
            expected="an integer or boolean mask", found=str(mask.dtype),
        )  # fmt: skip
    sizes = declared_shape(mask)
    wanted = {sizes[1], *(size for size in sizes if isinstance(size, str))}
    found = next((one for one in inputs if wanted <= set(declared_shape(one))), None)
    if found is None:
        raise UnsupportedError(
            "no cache input is as long as the mask", code=Code.PASS_PRECONDITION, at=mask.name, found=str(sizes[1]),
            hint="inject with cache=static, or remove the mask before inject",
        )  # fmt: skip
    return found


def _ones(editor: Editor, mask: ir.Value, source: ir.Value) -> ir.Value:
    """Return ones in the shape of the mask, whose dynamic dimensions are read from another input."""
    assert mask.dtype is not None
    sizes, int64 = declared_shape(mask), ir.DataType.INT64
    fixed = np.ones([size if isinstance(size, int) else 1 for size in sizes])
    one = editor.constant(fixed, mask.dtype.numpy(), name="counts")
    if all(isinstance(size, int) for size in sizes):
        return one
    shape = editor.node("Shape", [source], name=f"{source.name}_shape", dtype=int64)
    parts = []
    for size in sizes:
        if isinstance(size, str):
            axis = editor.constant([declared_shape(source).index(size)])
            parts.append(editor.node("Gather", [shape, axis], name="size", dtype=int64, shape=[1]))
        else:
            parts.append(editor.constant([size], name="size"))
    target = editor.node("Concat", parts, {"axis": 0}, name=f"{mask.name}_shape", dtype=int64, shape=[2])
    return editor.node("Expand", [one, target], name=f"{mask.name}.all", dtype=mask.dtype)
