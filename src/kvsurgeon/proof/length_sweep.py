"""Lengths to try, and context run at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, AttentionSite
from kvsurgeon.analysis.mask_patterns import Pattern, close, difference
from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes

LADDER = (1, 2, 7, 8, 40, 65, 129)  # tokens
USEFUL = 64  # tokens: a cache that is right for fewer is not worth having
FURTHER = (513, 1025)  # tokens at which whole matrices of weights would take long
FAR = 1 << 16  # numbers above are no lengths
LONGEST = 640  # tokens at which whole matrices of weights are looked at
DENSE = 1 << 21  # elements of such a matrix, all heads together

# fmt: off
_SWITCHES = frozenset({
    "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Equal", "Min", "Max", "Clip", "Div", "Mod", "Sub", "Mul",
})
# fmt: on


class LengthSweep:
    """Runs pieces of one decoder's context at the lengths that may make a difference."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.flow = analysis.flow
        self.fixed = analysis.length if isinstance(analysis.length, int) else None
        self.limit = min(self.flow.shapes.bounds, default=FAR)
        self.lengths = (self.fixed,) if self.fixed is not None else self._lengths()

    def _lengths(self) -> tuple[int, ...]:
        """Lengths on either side of every number that context may compare lengths with, and some others."""
        found = {min(length, self.limit) for length in LADDER}
        for node in self.flow.order:
            if node.op_type in _SWITCHES and self.flow.kinds.get(node.outputs[0]) is ValueKind.CONTEXT:
                for value in node.inputs:
                    found |= _near(small_constant(value))
        return tuple(sorted(length for length in found if 1 <= length <= self.limit))

    def dense(self, head: AttentionSite) -> list[int]:
        """The lengths at which all weights of an attention can be looked at."""
        shapes = [self.flow.shapes[value].shape or () for value in head.score_values]

        def fits(length: int) -> bool:
            return length <= LONGEST and all(_elements(shape, length) <= DENSE for shape in shapes)

        return [length for length in self.lengths if fits(length)] or [min(self.lengths)]

    def further(self, values: Sequence[ir.Value]) -> list[int]:
        """The lengths at which these values of context can be looked at, all of them at once."""
        shapes = [self.flow.shapes[value].shape or () for value in values]

        def fits(length: int) -> bool:
            return sum(_elements(shape, length) for shape in shapes) <= DENSE

        beyond = () if self.fixed is not None else (length for length in FURTHER if length <= self.limit)
        lengths = sorted({*self.lengths, *beyond})
        return [length for length in lengths if fits(length)] or lengths[:1]

    def experiment(self, outputs: Sequence[ir.Value], head: AttentionSite | None = None) -> SubgraphRunner:
        """Cut out what makes the outputs, from the scores of an attention on where one is given."""
        try:
            return SubgraphRunner(
                flow=self.flow, inputs=self.analysis.inputs, opsets=dict(self.analysis.model.graph.opset_imports),
                outputs=outputs,
                stand_ins=frozenset() if head is None else head.stand_ins,
                stops=frozenset() if head is None else head.ends,
            )  # fmt: skip
        except UnsupportedError:
            raise
        except Exception as error:
            raise _untried(outputs[0], error) from error

    def run(
        self,
        experiment: SubgraphRunner,
        length: int,
        seen: Pattern,
        *,
        through: InputRole | None = None,
        row: int | None = None,
        loudness: float = 1.0,
        places: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Run an experiment; see there.

        Raises:
            UnsupportedError: It does not run.
        """
        try:
            return experiment.run(length, seen, through=through, row=row, loudness=loudness, places=places)
        except Exception as error:
            raise _untried(experiment.outputs[0], error) from error

    def as_far_as_it_runs(
        self, lengths: Iterable[int], look: Callable[[int], list[np.ndarray]]
    ) -> dict[int, list[np.ndarray]]:
        """What is seen at each length; where it does not run, the export itself does not.

        Raises:
            UnsupportedError: It does not run at the first.
        """
        found: dict[int, list[np.ndarray]] = {}
        for length in lengths:
            try:
                found[length] = look(length)
            except UnsupportedError:
                if not found:
                    raise
                self.flow.shapes.bounds.add(_longest(look, max(found), length))
                break
        return found


def _longest(look: Callable[[int], object], runs: int, fails: int) -> int:
    """The longest length between the two at which something runs."""
    while fails - runs > 1:
        between = (runs + fails) // 2
        try:
            look(between)
            runs = between
        except UnsupportedError:
            fails = between
    return runs


def first(array: np.ndarray, axes: Axes, length: int) -> np.ndarray:
    """What an unfolded array says of the first tokens."""
    for place in range(1, len(axes) + 1):
        array = array.take(range(length), axis=-place)
    return array


def check_same(layer: int | None, at: ir.Value, longer: np.ndarray, shorter: np.ndarray) -> None:
    """Compare what two lengths say of the same positions.

    Raises:
        UnsupportedError: They differ.
    """
    if longer.shape == shorter.shape and close(longer, shorter):
        return
    raise UnsupportedError(
        "context changes with the number of tokens that follow, so what is remembered would grow stale",
        layer=layer, at=at.name, expected="the same value for a position at every total length",
        found=difference(longer, shorter), hint="frequencies or scales that depend on the total length",
    )  # fmt: skip


def _elements(shape: Sequence[Dimension], length: int) -> int:
    """How large a tensor is at a length, as far as its dimensions are known."""
    sizes = [at_length(size, length) for size in shape]
    return math.prod(size for size in sizes if isinstance(size, int))


def _near(constant: np.ndarray | None) -> set[int]:
    """Lengths on either side of a number and of its reciprocal."""
    if constant is None or constant.size != 1 or constant.dtype.kind not in "iuf":
        return set()
    number = float(constant.reshape(-1)[0])
    if number < 0 and constant.dtype.kind == "f":
        return set()  # what masks scores, not what lengths are compared with
    number = abs(number)
    sizes = [number, 1 / number] if number else []
    return {round(size) + beside for size in sizes if 1 <= size < FAR for beside in (-1, 0, 1, 3)}


def _untried(value: ir.Value, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        "context could not be run, so it cannot be shown to be causal and stable", at=value.name,
        found=" ".join(str(error).split())[:200],
    )  # fmt: skip
