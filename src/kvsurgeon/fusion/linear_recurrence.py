"""Recurrences over chunks as one operator: which values are its queries, keys, values and decays.

The state of each head is a matrix `[key_dim, value_dim]`. A token multiplies it by `exp(decay)`, adds the outer product
of its key and value, and reads it by its query. Which values of the region these are is found by their shapes and by
running the region: its results must be those of the formula, computed in float64, and of a product that may be added to
each token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.regions.recurrence import chunk_lengths
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_flow import RecurrentState, SequenceState, TokenFlow
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import is_operator
from kvsurgeon.symbolic.dimension import BATCH

_FIRST = 5  # tokens of the first run
_SCALES = (0.25, 0.05)  # of probe inputs: large ones show products of four, small ones what is added to each token
_CLOSE = 2e-4  # difference of sums in another order, as a part of the range of the results
_MOST = 12  # values of one shape that are tried

Arrays = dict[ir.Value, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class AddedProduct:
    """A product of a constant with a value of each token.

    Attributes:
        factors: Its factors, the constant and `[batch, sequence, heads, value_dim]`.
        result: The product in the region, which may have rows of padding at the end.
    """

    factors: tuple[ir.Value, ir.Value]
    result: ir.Value


@dataclass(frozen=True, kw_only=True)
class LinearRecurrence:
    """A recurrence as the inputs of one operator.

    Attributes:
        query: `[batch, sequence, heads, key_dim]`.
        key: `[batch, sequence, heads, key_dim]`.
        value: `[batch, sequence, heads, value_dim]`.
        decay: `[batch, sequence, heads]`, the logarithm of what the state is multiplied by.
        added: A product that is added to each token, if any.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    decay: ir.Value
    added: AddedProduct | None = None


def find_linear_recurrence(
    analysis: Analysis, state: SequenceState, recurrent: RecurrentState
) -> LinearRecurrence | None:
    """Return what a recurrence computes; None if it is not what the operator does."""
    flow, result = analysis.flow, analysis.flow.shapes[state.result]
    shape = result.shape
    if shape is None or len(shape) != 4 or result.dtype is not ir.DataType.FLOAT or len(recurrent.sizes) != 4:
        return None
    heads, width = shape[2:]
    keys = {recurrent.sizes[2], recurrent.sizes[3]} - {width} or {width}
    if recurrent.sizes[1] != heads or len(keys) != 1:
        return None
    (key_dim,) = keys
    found = _Candidates.of(flow, state)
    added = list(found.added(heads, width))
    values = [*found.computed, *(one.result for one in added if one is not None)]
    runner = SubgraphRunner(flow, list(dict.fromkeys([state.result, *values])), probed=found.sources)
    first = _runs(runner, found, _FIRST)
    shaped = (found.of_shape(heads), found.of_shape(heads, width), found.of_shape(heads, key_dim))
    if len(first) < len(_SCALES):
        return None
    best = min(_forms(added, *shaped), key=lambda one: _error(one, state.result, first), default=None)
    if best is None or _error(best, state.result, first) > _CLOSE:
        return None
    further = (_runs(runner, found, length) for length in sorted(_lengths(chunk_lengths(flow, state))))
    return best if all(_error(best, state.result, runs) <= _CLOSE for runs in further) else None


def _lengths(chunks: Collection[int]) -> set[int]:
    """Return lengths of texts around the ends of chunks."""
    return {length for chunk in chunks for length in (chunk - 1, chunk, chunk + 1, 2 * chunk + 3) if length > 1}


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Values of a region with a row for each token of a call."""

    flow: TokenFlow
    sources: tuple[ir.Value, ...]
    computed: tuple[ir.Value, ...]
    products: tuple[ir.Node, ...]

    @classmethod
    def of(cls, flow: TokenFlow, state: SequenceState) -> _Candidates:
        sources = tuple(dict.fromkeys(value for node, index in state.places if (value := node.inputs[index])))
        values = [value for node in state.nodes for value in node.outputs if value is not state.result]
        computed = tuple(value for value in values if (flow.shapes[value].shape or ())[:2] == (BATCH, flow.length))
        return cls(
            flow=flow, sources=sources, computed=computed,
            products=tuple(node for node in state.nodes if is_operator(node, "Mul")),
        )  # fmt: skip

    def of_shape(self, *sizes: object) -> list[ir.Value]:
        """Return the values of a shape after batch and sequence, those of the region first."""
        wanted = (BATCH, self.flow.length, *sizes)
        return [value for value in (*self.computed, *self.sources) if self.flow.shapes[value].shape == wanted][:_MOST]

    def added(self, *sizes: object) -> Iterator[AddedProduct | None]:
        """Yield the products with a constant that may be added to each token; None for no such product."""
        yield None
        values = self.of_shape(*sizes)
        for node in self.products:
            for factor, other in permutations(node.inputs):
                padding = None if other is None else other.producer()
                if is_operator(padding, "Pad"):
                    assert padding is not None
                    other = padding.inputs[0]
                if factor is not None and constant_tensor(factor) is not None and other in values:
                    yield AddedProduct(factors=(factor, other), result=node.outputs[0])


def _forms(
    added: Sequence[AddedProduct | None], decays: Sequence[ir.Value], values: Sequence[ir.Value],
    keys: Sequence[ir.Value],
) -> Iterator[LinearRecurrence]:  # fmt: skip
    for decay, value, (query, key), extra in product(decays, values, permutations(keys, 2), added):
        yield LinearRecurrence(query=query, key=key, value=value, decay=decay, added=extra)


def _runs(runner: SubgraphRunner, found: _Candidates, length: int) -> list[Arrays]:
    """Return the values for a text at each scale of probe inputs at which they are finite."""
    runs, tokens = [], np.arange(length)
    for scale in _SCALES:
        fed = runner.inputs.arrays(Rows.of_text(length), tokens=tokens, scale=scale)
        arrays = {value: fed[value.name or ""] for value in found.sources if value.name in fed}
        arrays |= dict(zip(runner.outputs, runner.run(length, tokens=tokens, scale=scale), strict=True))
        if all(np.isfinite(array).all() for array in arrays.values()):
            runs.append(arrays)
    return runs


def _error(one: LinearRecurrence, result: ir.Value, runs: Sequence[Arrays]) -> float:
    """Return the largest difference of the results from the formula, divided by their range; infinity without a run."""
    errors = []
    for arrays in runs:
        with np.errstate(over="ignore", invalid="ignore"):
            rows = linear_attention(*(arrays[value] for value in (one.query, one.key, one.value, one.decay)))
        expected = arrays[result]
        if one.added is not None:
            rows = rows + arrays[one.added.result][:, : rows.shape[1]]
        error = float(np.abs(expected - rows).max() / np.ptp(expected)) if expected.shape == rows.shape else np.inf
        errors.append(error if np.isfinite(error) else np.inf)
    return max(errors, default=np.inf)


def linear_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Return `[batch, sequence, heads, value_dim]`, from a state of zeros, in float64."""
    query, key, value, decay = (array.astype(np.float64) for array in (query, key, value, decay))
    state, rows = np.zeros((*key[:, 0].shape, value.shape[-1])), []
    for token in range(query.shape[1]):
        added = key[:, token, :, :, None] * value[:, token, :, None, :]
        state = np.exp(decay[:, token, :, None, None]) * state + added
        rows.append(np.einsum("bhk,bhkv->bhv", query[:, token], state))
    return np.stack(rows, axis=1)
