"""Rename dimensions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.errors import UsageError
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count


@dataclass(frozen=True, kw_only=True)
class RenameDims:
    """Rename symbolic dimensions, or set them to a number, in all declared shapes.

    Before: `input_ids [batch_size, sequence_length]`. After, with `batch_size=1` and `sequence_length=seq_len`:
    `[1, seq_len]`. The nodes are unchanged.

    Not handled: numbers that the graph cannot run with.

    Attributes:
        dims: Pairs of old and new name, such as `sequence_length=seq_len`.
    """

    name: ClassVar[str] = "rename-dims"

    dims: tuple[str, ...]

    def apply(self, subject: Subject) -> Outcome:
        """Rename the dimensions of `subject.model`.

        Raises:
            UsageError: An option is not of the form old=new, or two dimensions would get the same name.
        """
        names = dict(map(_pair, self.dims))
        graph = subject.model.graph
        values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
        values = [value for value in dict.fromkeys(values) if value.shape is not None]
        _check_distinct(
            {size for value in values for size in declared_shape(value) if isinstance(size, str) and size}, names
        )
        edits = 0
        for value in values:
            before = declared_shape(value)
            after = [names.get(size, size) if isinstance(size, str) else size for size in before]
            if after != list(before):
                value.shape = ir.Shape(after)
                edits += 1
        return Changed(edits=edits) if edits else Unchanged(reason=f"no dimension is named {' or '.join(names)}")


def _check_distinct(dims: set[str], names: Mapping[str, int | str]) -> None:
    """Check that different dimensions keep different names.

    Raises:
        UsageError: Two get the same name.
    """
    renamed = Counter(new for old, new in names.items() if old in dims and isinstance(new, str) and new != old)
    taken = [new for new, count in renamed.items() if count > 1 or new in dims - set(names)]
    if taken:
        raise UsageError(f"expected a distinct name for each dimension, found `{min(taken)}` for two")


def _pair(text: str) -> tuple[str, int | str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise UsageError(f"expected dims such as sequence_length=seq_len, found {text!r}")
    try:
        number = int(new)
    except ValueError:
        return old, new
    check_count(f"dims, {old}", number)
    return old, number
