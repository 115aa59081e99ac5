"""OperatorCall the dimensions of a model's inputs and outputs as its client does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count


@dataclass(frozen=True, kw_only=True)
class RenameDims:
    """Give dimensions other names, or a number, in every shape that the model declares.

    Before: `input_ids [batch_size, sequence_length]`. After, with `batch_size=1` and `sequence_length=seq_len`:
    `[1, seq_len]`. What the graph computes stays as it is.

    Not handled: a number that the graph cannot be run with.

    Attributes:
        dims: Old and new name of each, such as `sequence_length=seq_len`.
    """

    name: ClassVar[str] = "rename-dims"

    dims: tuple[str, ...]

    def apply(self, subject: Subject) -> Outcome:
        """RenameIo the dimensions of `subject.model`.

        Raises:
            UsageError: An option is not of the form old=new, or two dimensions would be called alike.
        """
        names = dict(self._pairs())
        graph = subject.model.graph
        values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
        self._check_apart(values, names)
        edits = sum(_rename(value, names) for value in dict.fromkeys(values))
        return Changed(edits=edits) if edits else Unchanged(reason=f"it has no dims called {', '.join(names)}")

    def _check_apart(self, values: Iterable[ir.Value], names: Mapping[str, int | str]) -> None:
        """Hold that dimensions which may differ are not called alike."""
        there = {
            size.value
            for value in values
            for size in value.shape or ()
            if isinstance(size, ir.SymbolicDim) and size.value
        }
        renamed = [new for old, new in names.items() if old in there and isinstance(new, str) and new != old]
        taken = (there - set(names)) & set(renamed) or {new for new in renamed if renamed.count(new) > 1}
        if taken:
            raise UsageError(f"expected a name for each dimension, found `{min(taken)}` for two that may differ")

    def _pairs(self) -> list[tuple[str, int | str]]:
        pairs: list[tuple[str, int | str]] = []
        for text in self.dims:
            old, equals, new = text.partition("=")
            if not (old and equals and new):
                raise UsageError(f"expected dims such as sequence_length=seq_len, found {text!r}")
            try:
                number = int(new)
            except ValueError:
                pairs.append((old, new))
            else:
                check_count(f"dims, {old}", number)
                pairs.append((old, number))
        return pairs


def _rename(value: ir.Value, names: dict[str, int | str]) -> bool:
    if value.shape is None:
        return False
    before = [size if isinstance(size, int) else size.value for size in value.shape]
    after = [names.get(size, size) if isinstance(size, str) else size for size in before]
    if before == after:
        return False
    value.shape = ir.Shape(after)
    return True
