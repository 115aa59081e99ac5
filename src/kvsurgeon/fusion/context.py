"""The graph that a fused operator is placed into: its lengths, and the inputs of its nodes before the rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.graph.editor import Editor
from kvsurgeon.resizing.lengths import LengthValues
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length

Sizes = tuple[Dimension, ...]


@dataclass(frozen=True, kw_only=True)
class FusionContext:
    """A graph during a rewrite.

    Attributes:
        flow: Sequence axes and shapes of the graph before the rewrite.
        editor: Editor of the graph.
        lengths: Lengths as values of the graph; `lengths.total` is the length that context is computed for.
        sequence: Query length S.
        total: Total sequence length T; less than `lengths.total` if the cache has unused rows.
        before: Inputs of each node before the rewrite.
        padding: Input that is 0 at the padding behind the tokens of each sequence, `[batch, total_sequence]`; None if
            all sequences are equally long.
    """

    flow: TokenFlow
    editor: Editor
    lengths: LengthValues
    sequence: Dimension
    total: Dimension
    before: Mapping[ir.Node, tuple[ir.Value | None, ...]]
    padding: ir.Value | None = None

    def token_sizes(self, value: ir.Value) -> Sizes:
        """Return the shape of token data after the rewrite, such as [..., S, T] for scores."""
        return self._sizes(value, self.flow.axes.get(value, ()))

    def context_sizes(self, node: ir.Node, index: int) -> Sizes:
        """Return the shape of the context slice at an input of a node."""
        value = self.before[node][index]
        assert value is not None
        return self._sizes(value, self.flow.demands.get((node, index), ()))

    def _sizes(self, value: ir.Value, axes: Axes) -> Sizes:
        sizes = [self.lengths.at(size, Length.TOTAL) for size in self.flow.shapes[value].shape or ()]
        for axis in axes:
            length = self.sequence if axis.variable.resolved() is Length.NEW else self.lengths.total
            sizes[axis.axis] = axis.outer * length * axis.inner
        return tuple(sizes)
