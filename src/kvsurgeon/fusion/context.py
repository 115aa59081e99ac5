"""Where a fused operator is put: how long things are there, and what nodes read before anything was changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length

Sizes = tuple[Dimension, ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A graph that is being changed.

    Attributes:
        new: Tokens that are given now.
        so_far: Tokens so far, these included.
        lengths: Where they can be read; its total is the length that context is computed for.
        before: The inputs that each node had.
    """

    flow: TokenFlow
    editor: Editor
    lengths: LengthValues
    new: Dimension
    so_far: Dimension
    before: Mapping[ir.Node, tuple[ir.Value | None, ...]]

    def of_tokens(self, value: ir.Value) -> Sizes:
        """The sizes of token data: of scores, [..., new, total]."""
        return self._sizes(value, self.flow.axes.get(value, ()))

    def of_context(self, node: ir.Node, index: int) -> Sizes:
        """The sizes of the context that a node reads."""
        value = self.before[node][index]
        assert value is not None
        return self._sizes(value, self.flow.demands.get((node, index), ()))

    def _sizes(self, value: ir.Value, axes: Axes) -> Sizes:
        sizes = [self.lengths.at(size, Length.TOTAL) for size in self.flow.shapes[value].shape or ()]
        for axis in axes:
            meant = self.new if axis.role.resolved() is Length.NEW else self.lengths.total
            sizes[axis.axis] = axis.outer * meant * axis.inner
        return tuple(sizes)
