"""The query and output projections that read keys and values, and changes to their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.calibration.head_groups import moved_heads
from kvsurgeon.calibration.head_maps import HeadMap, feature_places, head_columns, head_map
from kvsurgeon.calibration.shared_heads import SharedHeads
from kvsurgeon.calibration.weight_products import (
    FeatureChange,
    WeightProduct,
    check_readers,
    product_above,
    product_below,
    stored_weights,
)
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.weights.mapped import mapped_elements


@dataclass(frozen=True, kw_only=True)
class QueryProjection:
    """The projection of the queries of a layer.

    Attributes:
        product: The projection.
        heads: How it computes heads.
        reads: For each query head the KV head that it reads.
    """

    product: WeightProduct
    heads: HeadMap
    reads: tuple[int, ...]

    @classmethod
    def of(cls, trace: IndexTrace, one: SharedHeads, value: ir.Value) -> QueryProjection:
        """Return the projection of the queries of one of the layers.

        Raises:
            UnsupportedError: Queries are not linear in it, or something else reads it.
        """
        product, heads = mapped_heads(trace, one, value, len(one.reads))
        return cls(product=product, heads=heads, reads=one.reads)

    def changed(self, matrices: Mapping[int, np.ndarray], slots: Sequence[int] | None = None) -> list[FeatureChange]:
        """Return the changes for queries `matrix.T @ q`, where keys `k` of a KV head are now read as `matrix @ k`.

        Args:
            matrices: A matrix for each KV head whose keys are read otherwise.
            slots: The new place of each KV head, to which its query heads move too.

        Raises:
            UnsupportedError: The change of a head depends on the position.
        """
        on_columns = {kv_head: self.heads.on_columns(matrix.T) for kv_head, matrix in matrices.items()}
        columns, moved = self.heads.columns, _places(self.reads, slots)
        return [
            FeatureChange(target=columns[place], source=columns[head], matrix=on_columns[kv_head].T)
            for head, (place, kv_head) in enumerate(zip(moved, self.reads, strict=True))
            if kv_head in on_columns
        ]


@dataclass(frozen=True, kw_only=True)
class OutputProjection:
    """The projection of the result of a layer's attention.

    Attributes:
        product: The projection.
        rows: The rows of its weights that read each query head, `[query heads, value_dim]`.
        reads: For each query head the KV head that it reads.
    """

    product: WeightProduct
    rows: np.ndarray
    reads: tuple[int, ...]

    @classmethod
    def of(cls, trace: IndexTrace, one: SharedHeads, context: ir.Value) -> OutputProjection:
        """Return the projection of the result of one of the layers.

        Raises:
            UnsupportedError: Something else reads the result, or changes it before.
        """
        product = product_below(trace, context)
        rows = feature_places(trace.flow, context, product.features).reshape(len(one.reads), -1)
        return cls(product=product, rows=rows, reads=one.reads)

    def changed(self, matrices: Mapping[int, np.ndarray], slots: Sequence[int] | None = None) -> list[FeatureChange]:
        """Return the changes for values of a KV head that are now read as `matrix @ v`; `slots` as for queries."""
        moved = _places(self.reads, slots)
        return [
            FeatureChange(target=self.rows[place], source=self.rows[head], matrix=matrices[kv_head])
            for head, (place, kv_head) in enumerate(zip(moved, self.reads, strict=True))
            if kv_head in matrices
        ]

    def weights(self, kv_heads: int) -> list[np.ndarray]:
        """Return for each KV head `sum of W^T W` over the weights that read it, `[value_dim, value_dim]`."""
        (operand,) = self.product.operands
        stored = stored_weights(operand)
        assert stored is not None
        by_row = np.moveaxis(np.asarray(mapped_elements(stored)), operand.axis, 0)
        size = self.rows.shape[1]
        total = [np.zeros((size, size)) for _ in range(kv_heads)]
        for rows, kv_head in zip(self.rows, self.reads, strict=True):
            part = by_row[rows].reshape(size, -1).astype(np.float64)
            total[kv_head] += part @ part.T
        return total


def _places(reads: Sequence[int], slots: Sequence[int] | None) -> Sequence[int]:
    return range(len(reads)) if slots is None else moved_heads(reads, slots)


def mapped_heads(trace: IndexTrace, one: SharedHeads, value: ir.Value, heads: int) -> tuple[WeightProduct, HeadMap]:
    """Return the projection of keys, values or queries that only attention reads, and how it computes heads.

    Raises:
        UnsupportedError: They are not linear in one projection, or something else reads it.
    """
    product = product_above(trace, value)
    check_readers(trace.flow, product, one.ends)
    columns = head_columns(trace.flow, product.features, value, heads)
    return product, head_map(trace.flow, product.features, value, columns)


def complex_factor(matrix: np.ndarray, first: int, second: int, factor: complex) -> None:
    """Write the product with a complex number, whose parts are two features, into a matrix."""
    matrix[first, first] = matrix[second, second] = factor.real
    matrix[second, first], matrix[first, second] = factor.imag, -factor.imag
