"""What a cache mode is: how many rows go in and come out, and how new rows meet the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.cache_entries import CacheTensor
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic.dimension import Dimension


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What becomes of one entry in a call."""

    present: ir.Value  # the output
    whole: ir.Value  # what attention reads, one row for each token that context is computed for


class CacheMode(Protocol):
    """How a cache travels through a call."""

    @property
    def past(self) -> Dimension:
        """Rows of a past."""

    @property
    def present(self) -> Dimension:
        """Rows of a present."""

    @property
    def total(self) -> Dimension:
        """Rows that attention reads: the length that context is computed for."""

    def join(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, past: ir.Value, rows: ir.Value) -> Joined:
        """CachePair an entry's past and the new rows, both in the entry's layout and type."""

    def read(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, present: ir.Value) -> ir.Value:
        """Return the rows that attention outside an operator reads, where that operator has made the present."""
