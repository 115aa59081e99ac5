"""New only: the past in, the new rows out; the host puts them behind its past, or shifts it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.cache_entries import CacheTensor
from kvsurgeon.rewrite.cache_modes.mode import Joined
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import NEW, PAST, Dimension


@dataclass(frozen=True, kw_only=True)
class NewTokensCache:
    """`present = new rows`; attention reads `Concat(past, new rows)`.

    Attributes:
        past: Rows of the past: as many as there are past tokens, or as many as the host has room for.
    """

    past: Dimension = PAST

    @property
    def present(self) -> Dimension:
        """Only what is new."""
        return NEW

    @property
    def total(self) -> Dimension:
        """The past, and the new rows behind it."""
        return dim.add(self.past, NEW)

    def join(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, past: ir.Value, rows: ir.Value) -> Joined:
        """Let attention read both; give out the new rows."""
        whole = editor.node(
            "Concat", [past, rows], {"axis": entry.axis},
            name=f"{entry.present}.all", dtype=entry.dtype, shape=entry.shape(self.total),
        )  # fmt: skip
        shape = entry.shape(NEW)
        present = editor.node("Identity", [rows], name=entry.present, dtype=entry.dtype, shape=shape)
        return Joined(present=present, whole=whole)

    def read(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, present: ir.Value) -> ir.Value:
        """Nothing: no operator gives out new rows alone.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "no operator that holds attention and cache gives out new rows alone", at=entry.present,
            expected="a cache that grows or is written in place",
        )  # fmt: skip
