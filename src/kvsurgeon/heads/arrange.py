"""Brings tensors of token data from one layout into another, with as few operators as that takes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.graph.editor import Editor
from kvsurgeon.heads.layout import Layout, Logical
from kvsurgeon.rewrite.lengths import LengthValues, Source
from kvsurgeon.rewrite.reshape_targets import reshape_target
from kvsurgeon.symbolic.dimension import Dimension


def lengths_of(editor: Editor, inputs: Sequence[InputRole]) -> LengthValues:
    """Where batch and length of a decoder without a cache can be read at run time."""
    sources: dict[sympy.Symbol, Source] = {}
    for given in sorted(inputs, key=lambda given: not given.is_token):
        for axis, size in enumerate(given.dimensions):
            if isinstance(size, sympy.Symbol):
                sources.setdefault(size, Source(value=given.value, axis=axis))
    return LengthValues(editor, sources)


class Arrange:
    """Adds the operators that move heads."""

    def __init__(self, editor: Editor, lengths: LengthValues) -> None:
        self.editor = editor
        self.lengths = lengths
        self._made: dict[Hashable, ir.Value] = {}

    def reshaped(
        self, value: ir.Value, before: Sequence[Dimension], after: Sequence[Dimension], dtype: ir.DataType | None
    ) -> ir.Value:
        """The value in other axes, row by row."""
        if list(before) == list(after):
            return value
        target = reshape_target(self.lengths, after, before)
        return self._node("Reshape", [value, target], {}, f"{value.name}.reshaped", dtype)

    def transposed(self, value: ir.Value, order: Sequence[int], dtype: ir.DataType | None) -> ir.Value:
        """The value with its axes in another order."""
        if list(order) == sorted(order):
            return value
        return self._node("Transpose", [value], {"perm": list(order)}, f"{value.name}.transposed", dtype)

    def _node(
        self, operator: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], name: str,
        dtype: ir.DataType | None,
    ) -> ir.Value:  # fmt: skip
        """The node that computes this, made once: layers that share heads share what is made of them."""
        key = (operator, tuple(inputs), repr(attributes))
        if key not in self._made:
            self._made[key] = self.editor.node(operator, inputs, attributes, name=name, dtype=dtype)
        return self._made[key]

    def placed(
        self, value: ir.Value, tokens: Sequence[Dimension], shape: Sequence[Dimension], wanted: Layout,
        dtype: ir.DataType | None,
    ) -> ir.Value:  # fmt: skip
        """A tensor whose last axis holds all features in order, in the layout that is wanted.

        Args:
            value: [tokens..., features]: batch and sequence first, in the order in which `wanted` has them or not.
            tokens: Batch and sequence, in the value's order.
            shape: The shape of the value.
            wanted: The layout to bring it into.
            dtype: The type of its elements.
        """
        features = list(wanted.features)
        value = self.reshaped(value, shape, [*tokens, *features], dtype)
        own = [wanted.parts[place] for place in wanted.token_places]
        order = list(range(len(tokens))) if list(tokens) == own else list(reversed(range(len(tokens))))
        came = dict(zip(wanted.token_places, order, strict=True))
        came |= {place: len(tokens) + number for number, place in enumerate(wanted.feature_places)}
        value = self.transposed(value, [came[place] for place in range(len(wanted.parts))], dtype)
        return self.reshaped(value, wanted.parts, wanted.shape, dtype)

    def repeated(
        self, value: ir.Value, before: Sequence[Dimension], axes: Logical, heads: np.ndarray, wanted: Logical,
        after: Sequence[Dimension], dtype: ir.DataType | None,
    ) -> ir.Value:  # fmt: skip
        """A tensor with other heads, each of them one of those that it has.

        Args:
            value: The tensor.
            before: Its own axes, which make up `axes`.
            axes: Batch, sequence, heads and head_dim, in the tensor's order.
            heads: For each head of the result, which of the tensor's it is.
            wanted: The order in which the result has them.
            after: The axes of the result, which make up `wanted`.
            dtype: The type of its elements.
        """
        axes = tuple(axis for axis in axes if axis[0] in dict(wanted))  # or a batch of 1, which takes no place
        words = [word for word, _ in axes]
        value = self.reshaped(value, before, _sizes(axes), dtype)
        value, sizes = self._taken(value, _sizes(axes), words.index("heads"), heads, dtype)
        order = [words.index(word) for word, _ in wanted if word in words]
        value = self.transposed(value, order, dtype)
        return self.reshaped(value, [sizes[place] for place in order], after, dtype)

    def _taken(
        self, value: ir.Value, sizes: list[Dimension], place: int, heads: np.ndarray, dtype: ir.DataType | None
    ) -> tuple[ir.Value, list[Dimension]]:
        count = int(sizes[place])
        times = len(heads) // count
        after = [*sizes[:place], len(heads), *sizes[place + 1 :]]
        if np.array_equal(heads, np.arange(count)):
            return value, sizes
        if not np.array_equal(heads, np.repeat(np.arange(count), times)):
            index = self.editor.constant(heads.tolist(), name="heads")
            return self._node("Gather", [value, index], {"axis": place}, f"{value.name}.heads", dtype), after
        apart = [*sizes[: place + 1], 1, *sizes[place + 1 :]]
        value = self.reshaped(value, sizes, apart, dtype)
        times_each = self.editor.constant([times if at == place + 1 else 1 for at in range(len(apart))], name="repeat")
        value = self._node("Expand", [value, times_each], {}, f"{value.name}.repeated", dtype)
        return self.reshaped(value, [*sizes[: place + 1], times, *sizes[place + 1 :]], after, dtype), after


def _sizes(axes: Logical) -> list[Dimension]:
    return [size for _, size in axes]
