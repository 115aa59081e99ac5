"""Index traces: operators that only rearrange elements, run on the indices of the elements.

Whichever way a layout is written, with Split, Slice, Gather or Transpose, the result is one array of indices.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.analysis.token_data import token_inputs, upstream_tokens
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import producers
from kvsurgeon.heads.layout import Layout, layout_of
from kvsurgeon.ops.contraction import Contraction
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import contraction_of, has_trait, operator_of
from kvsurgeon.symbolic.fact import Fact

LENGTH = 3  # tokens of the traced tensors


class IndexTrace:
    """Index traces between values of token data: which element of one value each element of another is."""

    def __init__(self, flow: TokenFlow) -> None:
        self.flow = flow

    def rearranges(self, node: ir.Node | None) -> bool:
        """Return whether a node only rearranges elements of token data, in a known way."""
        operator = None if node is None else operator_of(node)
        if node is None or operator is None or Trait.REARRANGE not in operator.traits:
            return False
        sources = token_inputs(self.flow, node)
        if node.op_type == "Concat":
            return all(value in sources for value in node.inputs)
        if Trait.LOOKUP in operator.traits:
            return node.inputs[0] in sources and self._whole_numbers(node.inputs[1]) is not None
        return len(sources) == 1 and (node.op_type != "Slice" or slice_bounds(self.flow.shapes.call(node)) is not None)

    def is_elementwise(self, node: ir.Node) -> bool:
        """Return whether a node with one source of token data is elementwise, or rearranges elements."""
        return (
            has_trait(node, Trait.ELEMENTWISE, Trait.BROADCAST)
            or node.op_type == "DynamicQuantizeLinear"
            or self.rearranges(node)
        )

    def source(self, value: ir.Value) -> ir.Value:
        """Return the value that this one is a rearrangement of; the value itself if it is computed."""
        node = value.producer()
        if node is None or not self.rearranges(node):
            return value
        found = {self.source(one) for one in token_inputs(self.flow, node)}
        return found.pop() if len(found) == 1 else value

    def is_projected(self, value: ir.Value) -> bool:
        """Return whether a value depends on a projection, not on positions alone."""
        projections = (
            node for node in producers(upstream_tokens(self.flow, value)) if has_trait(node, Trait.PROJECTION)
        )
        return any(map(self.sums_features, projections))

    def sums_features(self, node: ir.Node) -> bool:
        """Return whether a product sums over more than one element, unlike positions times frequencies."""
        found = contraction_of(self.flow.shapes.call(node))
        return found is None or any(self._size(node, found, label) != 1 for label in found.summed)

    def _size(self, node: ir.Node, found: Contraction, label: str) -> object:
        """The number of elements that a product sums along a label."""
        shape = self.flow.shapes[node.inputs[found.left]].shape or ()  # type: ignore[index]
        return shape[found.left_labels.index(label)] if label in found.left_labels else None

    def feature_indices(self, source: ir.Value, value: ir.Value) -> np.ndarray:
        """Return for each feature of a token of `value` the index of the source's feature that it is.

        Both are counted in row-major order; the result has the shape of the features of `value`.

        Raises:
            UnsupportedError: Tokens are moved too, or a tensor has axes other than batch, sequence and features.
        """
        before, after = layout_of(self.flow, source), layout_of(self.flow, value)
        places = np.arange(math.prod(self.sizes(before.parts, source))).reshape(self.sizes(before.shape, source))
        numbered = self._by_token(places, before, source)
        token, feature = np.empty(places.size, dtype=np.int64), np.empty(places.size, dtype=np.int64)
        token[numbered] = np.arange(len(numbered))[:, None]
        feature[numbered] = np.arange(before.width)
        moved = self._by_token(self._run(source, value, places), after, value)
        if not np.array_equal(token[moved], np.broadcast_to(np.arange(len(moved))[:, None], moved.shape)):
            raise UnsupportedError(
                "cannot trace heads where tokens are rearranged too", code=Code.UNTRACEABLE_HEADS, at=value.name
            )
        found = feature[moved]
        if not (found == found[0]).all():
            raise UnsupportedError(
                "cannot trace heads that are arranged differently for each token", code=Code.UNTRACEABLE_HEADS,
                at=value.name,
            )  # fmt: skip
        return np.asarray(found[0].reshape(after.features))

    def sizes(self, dimensions: Sequence[Any], at: ir.Value) -> list[int]:
        """Return dimensions for two sequences of `LENGTH` tokens.

        Raises:
            UnsupportedError: One of them is unknown.
        """
        try:
            return [int(at_length(size, LENGTH)) for size in dimensions]
        except TypeError as error:
            raise UnsupportedError(
                "cannot trace heads: a dimension is unknown", code=Code.UNTRACEABLE_HEADS, at=at.name
            ) from error

    def shape(self, value: ir.Value) -> list[int]:
        """Return the shape of a value for two sequences of `LENGTH` tokens."""
        return self.sizes(self.flow.shapes[value].shape or (), value)

    def _by_token(self, array: np.ndarray, layout: Layout, at: ir.Value) -> np.ndarray:
        """[batch * sequence, features]: the elements of each token in one row."""
        parts = array.reshape(self.sizes(layout.parts, at))
        first = [place for place in (layout.batch, layout.sequence) if place is not None]
        return parts.transpose([*first, *layout.feature_places]).reshape(-1, layout.width)

    def _whole_numbers(self, value: ir.Value | None) -> np.ndarray | None:
        fact = None if value is None else self.flow.shapes[value]
        if fact is None or fact.value is None or not all(isinstance(one, int) for one in fact.value.reshape(-1)):
            return None
        return fact.value.astype(np.int64)

    def _run(self, source: ir.Value, value: ir.Value, places: np.ndarray) -> np.ndarray:
        if value is source:
            return places
        node = value.producer()
        if node is None or not self.rearranges(node):
            raise UnsupportedError("cannot trace heads through this value", code=Code.UNTRACEABLE_HEADS, at=value.name)
        tokens, operator = token_inputs(self.flow, node), operator_of(node)
        arrays = {one: self._run(source, one, places) for one in node.inputs if one is not None and one in tokens}
        facts = [None if one is None else self._fact(one, arrays.get(one)) for one in node.inputs]
        call = replace(self.flow.shapes.call(node), inputs=tuple(facts), widest=sys.maxsize)
        results = None if operator is None else operator.shape(call)
        result = results[value.index() or 0] if isinstance(results, list) else results
        if result is None or result.value is None:
            raise UnsupportedError(
                f"cannot trace heads through {node.op_type}: its elements are unknown", at=value.name,
                code=Code.UNTRACEABLE_HEADS,
            )  # fmt: skip
        return result.value.astype(np.int64)

    def _fact(self, value: ir.Value, array: np.ndarray | None) -> Fact:
        """Return the fact of a value for two sequences of `LENGTH` tokens; its numbers are an array if one is given."""
        fact = self.flow.shapes[value]
        if array is not None:
            return Fact(array.shape, fact.dtype, array)
        at = np.frompyfunc(lambda number: at_length(number, LENGTH), 1, 1)
        numbers = None if fact.value is None else np.asarray(at(fact.value), dtype=object)
        return Fact(tuple(self.shape(value)), fact.dtype, numbers)
