"""Nodes that bring token data from one layout into another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.graph.editor import Editor
from kvsurgeon.heads.layout import Layout, NamedDims
from kvsurgeon.resizing.lengths import LengthValues, sources_of
from kvsurgeon.symbolic.dimension import Dimension

Shape = Sequence[Dimension]


class LayoutBuilder:
    """Adds `Reshape`, `Transpose`, `Expand` and `Gather` nodes, equal ones once and only those that change something.

    Attributes:
        editor: Adds the nodes.
        lengths: Batch size and sequence length as values of the graph.
    """

    def __init__(self, editor: Editor, inputs: Sequence[InputRole]) -> None:
        self.editor = editor
        ordered = sorted(inputs, key=lambda given: not given.is_token)
        sources = sources_of({given.value: given.dimensions for given in ordered})
        self.lengths = LengthValues(editor, sources)
        self._nodes: dict[Hashable, ir.Value] = {}

    def reshape(self, value: ir.Value, before: Shape, after: Shape) -> ir.Value:
        """Return the value of shape `before` in shape `after`."""
        if list(before) == list(after):
            return value
        return self._node("Reshape", [value, self.lengths.reshape_target(after, before)], {}, "reshaped")

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """Return the value with its axes in another order."""
        if list(order) == sorted(order):
            return value
        return self._node("Transpose", [value], {"perm": list(order)}, "transposed")

    def place_features(self, value: ir.Value, shape: Shape, tokens: Shape, layout: Layout) -> ir.Value:
        """Return token data in a layout.

        Args:
            value: Token data with all features on its last axis.
            shape: Its shape.
            tokens: Batch and sequence, in the order of the value; it may differ from that of the layout.
            layout: The layout to return.
        """
        value = self.reshape(value, shape, [*tokens, *layout.features])
        wanted = [layout.parts[place] for place in layout.token_places]
        order = range(len(tokens)) if list(tokens) == wanted else reversed(range(len(tokens)))
        axes = dict(zip(layout.token_places, order, strict=True))
        axes |= {place: len(tokens) + number for number, place in enumerate(layout.feature_places)}
        value = self.transpose(value, [axes[place] for place in range(len(layout.parts))])
        return self.reshape(value, layout.parts, layout.shape)

    def gather_heads(
        self, value: ir.Value, shape: Shape, dims: NamedDims, heads: np.ndarray, new_dims: NamedDims, new_shape: Shape
    ) -> ir.Value:
        """Return token data with other heads, in another layout.

        Args:
            value: Token data.
            shape: Its shape.
            dims: Its dimensions.
            heads: For each head of the result the head of the value.
            new_dims: Dimensions of the result, in its order.
            new_shape: Shape of the result.
        """
        dims = tuple(one for one in dims if one[0] in dict(new_dims))  # the result may leave out a batch of 1
        names, sizes = [name for name, _ in dims], [size for _, size in dims]
        value = self.reshape(value, shape, sizes)
        value, sizes = self._gather(value, sizes, names.index("heads"), heads)
        order = [names.index(name) for name, _ in new_dims if name in names]
        value = self.transpose(value, order)
        return self.reshape(value, [sizes[axis] for axis in order], new_shape)

    def _gather(
        self, value: ir.Value, shape: list[Dimension], axis: int, heads: np.ndarray
    ) -> tuple[ir.Value, list[Dimension]]:
        count = int(shape[axis])
        times = len(heads) // count
        before, behind = shape[:axis], shape[axis + 1 :]
        after = [*before, len(heads), *behind]
        if np.array_equal(heads, np.arange(count)):
            return value, shape
        if not np.array_equal(heads, np.repeat(np.arange(count), times)):
            index = self.editor.constant(heads.tolist(), name="heads")
            return self._node("Gather", [value, index], {"axis": axis}, "heads"), after
        value = self.reshape(value, shape, [*before, count, 1, *behind])
        repeat = [1] * (len(shape) + 1)
        repeat[axis + 1] = times
        value = self._node("Expand", [value, self.editor.constant(repeat, name="repeat")], {}, "repeated")
        return self.reshape(value, [*before, count, times, *behind], after), after

    def _node(self, operator: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], suffix: str) -> ir.Value:
        key = (operator, tuple(inputs), repr(attributes))
        if key not in self._nodes:
            name, dtype = f"{inputs[0].name}.{suffix}", inputs[0].dtype
            self._nodes[key] = self.editor.node(operator, inputs, attributes, name=name, dtype=dtype)
        return self._nodes[key]
