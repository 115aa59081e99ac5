"""Length sweep: the lengths at which context is run, and runs of context at these lengths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import describe_difference, is_close
from kvsurgeon.analysis.probe_inputs import EXTENT
from kvsurgeon.analysis.regions.probe_lengths import elements_at
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.thresholds import MAX_LENGTH, SCANNED, Thresholds, bisect, lengths_near
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.proof.batch_sizes import BATCHES, MAX_BATCH, BatchSizes, batch_sizes
from kvsurgeon.proof.length_dependence import LengthDependence
from kvsurgeon.symbolic.dimension import Extent
from kvsurgeon.symbolic.sequence_axes import Axes

LENGTHS = (1, 2, 7, 8, 40, 65, 129)  # tokens
LONG_LENGTHS = (513, 1025)  # tokens, for values that grow with the length and not with its square
MIN_USEFUL_LENGTH = 64  # tokens: a cache that is correct for fewer is of no use
MAX_ATTENTION_LENGTH = 160  # tokens at which all attention weights are computed; beyond, some rows are
MAX_ELEMENTS = 1 << 21  # of the attention weights, all heads together


class LengthSweep:
    """Runs context of one decoder at the lengths that may make a difference.

    Args:
        analysis: The analysis of the decoder.
        bounds: Further upper bounds of the length, in tokens.

    Attributes:
        fixed: The length of an export of fixed length.
        bounds: Upper bounds of the length, in tokens; those found by running are added.
        assumptions: Statements that the results rest on, each with the name of the value it is about.
        unproved: Inputs at which token data reads context that may depend on the length by value, with the cause.
        numbers: Numbers that context may compare a length or a position with, such as windows.
        lengths: Lengths at either side of each of these numbers, and some others; all short ones if anything is not
            proved.
        changes: Positions and lengths at which running showed that context changes.
        changed_at_masked: Name of a value of context that changes at masked tokens if others follow; None if none does.
        changed_beyond: For each limit, if a longer text was compared: the name of the first value that differs.
    """

    def __init__(self, analysis: Analysis, bounds: Collection[int] = ()) -> None:
        self.analysis = analysis
        self.flow = analysis.flow
        self.fixed = analysis.length if isinstance(analysis.length, int) else None
        self.bounds = {*self.flow.shapes.bounds, *bounds}
        self.assumptions: dict[str, str] = {}
        self.changes: set[int] = set()
        self.changed_at_masked: str | None = None
        self.changed_beyond: dict[int, str] = {}
        self._limit = min(self.bounds, default=MAX_LENGTH)
        self._thresholds = Thresholds(self.flow)
        self.numbers = () if self.fixed is not None else self._numbers()
        self._dependence = LengthDependence(analysis) if self.fixed is None else None
        self.unproved = {} if self._dependence is None else self._dependence.unproved()
        self.lengths = (self.fixed,) if self.fixed is not None else self._lengths()

    @property
    def longest(self) -> int:
        """The longest text of which rows are checked, in tokens."""
        return min(self._limit, MAX_LENGTH)

    @cached_property
    def _batch_sizes(self) -> BatchSizes:
        return batch_sizes(self.flow)

    @property
    def batches(self) -> tuple[int, ...]:
        """Sizes of batches to run, in addition to two."""
        return self._batch_sizes.sizes

    def check_batch_sizes(self) -> None:
        """Check that these are all sizes at which context may change.

        Raises:
            UnsupportedError: It may change at a larger one.
        """
        if (beyond := self._batch_sizes.beyond) is not None:
            raise UnsupportedError(
                "context may change with a number of sequences that is too large to run", code=Code.BATCH_LEAK,
                at=beyond.name, expected=f"at most {MAX_BATCH} sequences", hint="export with a batch of 1",
            )  # fmt: skip

    def end_at(self, length: int) -> None:
        """Check no longer text: what changes there cannot be found, so it limits what is not proved."""
        self._limit = min(self._limit, length)

    def depends_on_length(self, value: ir.Value) -> bool:
        """Return whether a value of context may depend on the total length by value."""
        return self._dependence is not None and value in self._dependence.causes

    def thresholds(self, values: Iterable[ir.Value | None]) -> tuple[int, ...]:
        """Return the lengths at which context that these values are computed from may change."""
        return lengths_near(self._thresholds.find(values))

    def _numbers(self) -> tuple[int, ...]:
        flow = self.flow
        read = dict.fromkeys(value for node in flow.order if is_token(flow, node.outputs[0]) for value in node.inputs)
        return self._thresholds.find(
            [one for one in read if one is not None and flow.kinds.get(one) is ValueKind.CONTEXT]
        )

    def _lengths(self) -> tuple[int, ...]:
        lengths = {min(length, self._limit) for length in LENGTHS} | set(lengths_near(self.numbers))
        if self.unproved:  # a quotient of small numbers may change at any length
            lengths |= set(range(1, MIN_USEFUL_LENGTH))
        return tuple(sorted(length for length in lengths if 1 <= length <= self._limit))

    def totals(self, passed: int, thresholds: Sequence[int], *, proved: bool) -> list[int]:
        """Return the total lengths at which to check rows.

        Args:
            passed: The longest total length at which all rows were checked.
            thresholds: Lengths at which something may change.
            proved: Whether the rows are proved to be prefix stable, so that the longest text contains all others.
        """
        longest = self.longest
        if proved:
            reach = [2 * length for length in thresholds if length < longest]
            return [min(longest, max([SCANNED, *reach]))] if longest > passed else []
        return growing_lengths(passed, longest, thresholds) if longest > passed else []

    def with_half(self, length: int) -> tuple[int, ...]:
        """Return half a length and the length; of an export of fixed length, that alone."""
        return (max(1, length // 2), length) if self.fixed is None else (self.fixed,)

    def attention_lengths(self, site: AttentionSite) -> list[int]:
        """Return the lengths at which the weights of an attention are small enough to compute."""
        shapes = [self.flow.shapes[value].shape or () for value in site.score_values]

        def fits(length: int) -> bool:
            return length <= MAX_ATTENTION_LENGTH and all(
                elements_at(shape, length) <= MAX_ELEMENTS for shape in shapes
            )

        return [length for length in self.lengths if fits(length)] or [min(self.lengths)]

    def context_lengths(self, values: Iterable[ir.Value]) -> list[int]:
        """Return the lengths at which these values of context are small enough to compute together."""
        shapes = [self.flow.shapes[value].shape or () for value in values]
        longer = () if self.fixed is not None else (length for length in LONG_LENGTHS if length <= self._limit)
        lengths = sorted({*self.lengths, *longer})
        small = [length for length in lengths if sum(elements_at(shape, length) for shape in shapes) <= MAX_ELEMENTS]
        return small or lengths[:1]

    def runner(
        self, outputs: Sequence[ir.Value], site: AttentionSite | None = None, given: Collection[ir.Value] = ()
    ) -> SubgraphRunner:
        """Return a runner that computes the outputs, from the scores of an attention if one is given."""
        return SubgraphRunner(
            self.flow, outputs, probed=() if site is None else site.weight_sources,
            stops=() if site is None else site.ends, assumptions=self.assumptions, given=given,
        )  # fmt: skip

    def add_failure(self, limit: int, failed: UnsupportedError | None) -> None:
        """Record what is not prefix stable beyond a limit, if a longer text was compared."""
        if failed is not None and failed.code is not Code.CONTEXT_NOT_RUNNABLE and failed.at is not None:
            self.changed_beyond.setdefault(limit, failed.at)

    def run(self, lengths: Iterable[int], run: Callable[[int], list[np.ndarray]]) -> dict[int, list[np.ndarray]]:
        """Run context at each length, up to the longest at which the export runs.

        Raises:
            UnsupportedError: It does not run at the first length.
        """
        results: dict[int, list[np.ndarray]] = {}
        for length in lengths:
            try:
                results[length] = run(length)
            except UnsupportedError as error:
                if not results:
                    raise
                self.bounds.add(self._checked(*bisect(run, max(results), length, error)))
                break
        return results

    def _checked(self, longest: int, error: UnsupportedError) -> int:
        """Return the longest length at which context runs, unless that may be another size that it was run with.

        Raises:
            UnsupportedError: It is no more than the number of sequences, or the size of probed extents.
        """
        if longest <= max(BATCHES):
            raise error
        sizes = {size: given for given in self.flow.inputs for size in given.dimensions if isinstance(size, Extent)}
        if sizes and longest <= EXTENT:
            extent, given = next(iter(sizes.items()))
            raise UnsupportedError(
                "an input is read as if it were as long as the text", code=Code.INPUT_ROLE, at=given.value.name,
                found=f"a dimension `{extent}`", hint="give equal dimensions equal names",
            ) from error  # fmt: skip
        return longest


def first_tokens(array: np.ndarray, axes: Axes, length: int) -> np.ndarray:
    """Return the first tokens of an array whose sequence axes are last."""
    for place in range(-len(axes), 0):
        array = array.take(range(min(length, array.shape[place])), axis=place)
    return array


def check_prefix_stable(
    name: str, longer: np.ndarray, shorter: np.ndarray, at: ir.Value, layer: int | None = None
) -> None:
    """Compare the results of two lengths for the same positions.

    Args:
        name: What the results are, in the plural.
        longer: The result at the longer length.
        shorter: The result at the shorter length.
        at: The value that was computed.
        layer: Index of the attention layer.

    Raises:
        UnsupportedError: They differ.
    """
    if longer.shape == shorter.shape and is_close(longer, shorter):
        return
    effect = "cached keys would become invalid" if layer is None else "a KV cache would change the result"
    raise UnsupportedError(
        f"{name} depend on the total length, so {effect}", code=Code.LENGTH_DEPENDENT, layer=layer, at=at.name,
        expected="the same value for a position at every total length", found=describe_difference(longer, shorter),
        hint="frequencies or scales that are computed from the length are a common cause",
    )  # fmt: skip


def growing_lengths(shortest: int, longest: int, thresholds: Sequence[int]) -> list[int]:
    """Return total lengths from short to long: each about one and a half of the one before, and every threshold."""
    powers = [(1 << power) + 1 for power in range(7, 31)]
    between = [(low + high) // 2 for low, high in pairwise(powers)]
    steps = [length for length in (*powers, *between) if shortest < length]
    return sorted({longest, *(length for length in (*steps, *thresholds) if 1 < length < longest)})
