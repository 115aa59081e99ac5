"""Let a model with a cache count every token that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import Refused
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class WithoutMask:
    """Make the attention mask in the graph, as one that lets every token count, instead of taking it as an input.

    Before: `attention_mask [batch_size, max_length]` is given. After: it is ones, as many as the cache has rows. The
    result is that of a call without padding: tokens behind the real ones are hidden from these by causality, and
    padding on the left is not possible.

    Not handled: a mask as long as the tokens so far, which only a cache that is written in place has not.
    """

    name: ClassVar[str] = "without-mask"

    def apply(self, subject: Subject) -> Outcome:
        """Take the mask input out of `subject.model`.

        Raises:
            Refused: It is no mask of whole numbers or truths, or it has no length that a cache has too.
        """
        graph = subject.model.graph
        masks = [value for value in graph.inputs if len(value.shape or ()) == 2 and _length(value) in _TOTALS]
        if not masks:
            return Unchanged(reason="no input is given for all tokens so far")
        sources = [_sizes(graph, mask) for mask in masks]
        editor = Editor(subject.model)
        for mask, (buffer, axes) in zip(masks, sources, strict=True):
            self._fill(editor, mask, buffer, axes)
        editor.finish()
        return Changed(edits=editor.edits)

    def _fill(self, editor: Editor, mask: ir.Value, buffer: ir.Value, axes: list[int]) -> None:
        assert mask.dtype is not None
        assert mask.shape is not None
        sizes = editor.node("Shape", [buffer], wish=f"{buffer.name}_shape", dtype=ir.DataType.INT64)
        places, shape = editor.constant(axes, wish="places"), [len(axes)]
        target = editor.node("Gather", [sizes, places], wish=f"{mask.name}_shape", dtype=ir.DataType.INT64, shape=shape)
        rows = mask.shape[0] if isinstance(mask.shape[0], int) else 1
        one = editor.constant([[1]] * rows, mask.dtype.numpy(), wish="counts")
        ones = editor.node("Expand", [one, target], wish=f"{mask.name}.all", dtype=mask.dtype)
        ones.shape = mask.shape
        mask.replace_all_uses_with(ones)
        editor.graph.inputs.remove(mask)


_TOTALS = ("total_sequence_length", "max_length")


def _length(mask: ir.Value) -> int | str | None:
    assert mask.shape is not None
    size = mask.shape[1]
    return size if isinstance(size, int) else size.value


def _sizes(graph: ir.Graph, mask: ir.Value) -> tuple[ir.Value, list[int]]:
    """An input of the cache, and its axes that have the sizes of the mask; a batch that is a number needs none."""
    if mask.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        raise Refused("what makes every token count is not known of this mask", at=mask.name, found=str(mask.dtype))
    assert mask.shape is not None
    wanted = [str(size.value) for size in mask.shape if not isinstance(size, int)]
    for value in graph.inputs:
        names = [None if isinstance(size, int) else size.value for size in value.shape or ()]
        if len(names) == 4 and set(wanted) <= set(names):
            return value, [names.index(name) for name in wanted]
    raise Refused(
        "no cache is as long as the mask", at=mask.name, found=str(_length(mask)), hint="inject in place first"
    )
