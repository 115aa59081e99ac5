"""Batch sizes: the numbers of sequences that context is run with, because it may compare them with a number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import sympy

from kvsurgeon.analysis.thresholds import numbers_of
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait, operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH
from kvsurgeon.symbolic.fact import Fact

BATCHES = (3, 5)  # sequences that context is run with, in addition to two
MAX_BATCH = 16  # sequences; context is run with no more
_LARGEST = 1 << 20  # sequences: no batch has more


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """The numbers of sequences to run context with.

    Attributes:
        sizes: Some sizes in addition to two, and those near thresholds.
        beyond: A value that may change at a larger number of sequences than is run; None if there is none.
    """

    sizes: tuple[int, ...] = ()
    beyond: ir.Value | None = None


def batch_sizes(flow: TokenFlow) -> BatchSizes:
    """Return the batch sizes to run context with."""
    if flow.batch is not BATCH:
        return BatchSizes()
    near: set[int] = set()
    found, beyond = _Counts(flow), list[ir.Value]()
    for node in flow.order:
        found.visit(node)
        compares = has_trait(node, Trait.LENGTH_SENSITIVE) and not has_trait(node, Trait.SCALE, Trait.ADD)
        counts, looks_up = compares and any(map(found.counts, node.inputs)), found.looks_up(node)
        if counts:
            near |= {int(number) + more for number in _constants(node) for more in (0, 1, 2)}  # an index is less
        if looks_up or (compares and found.compares_computed(node)):
            counts, near = True, near | set(range(MAX_BATCH + 1))
        counts = counts and not (looks_up and found.is_of_tokens(node))
        threshold = found.threshold(node, looks_up=looks_up) if counts else 0.0
        if MAX_BATCH < threshold < _LARGEST or threshold == math.inf:
            beyond.append(node.outputs[0])
    sizes = {*BATCHES, *(batch for batch in near if BATCHES[0] < batch <= MAX_BATCH)}
    return BatchSizes(sizes=tuple(sorted(sizes)), beyond=next(iter(beyond), None))


def _constants(node: ir.Node) -> list[float]:
    return [number for value in node.inputs for number in numbers_of(small_constant(value))]


def _expressions(fact: Fact) -> list[sympy.Expr]:
    """Return the known numbers of a value that are symbolic."""
    return [] if fact.value is None else [number for number in fact.value.flat if isinstance(number, sympy.Expr)]


def _largest_factor(numbers: Iterable[float]) -> float:
    return max((max(abs(number), 1 / abs(number)) for number in numbers if number), default=1.0)


class _Counts:
    """Context that holds the number of sequences, or a number for each, and what arithmetic makes of it."""

    def __init__(self, flow: TokenFlow) -> None:
        self._flow = flow
        self._direct: set[ir.Value] = set()  # the same numbers, elsewhere
        self._computed: set[ir.Value] = set()  # other numbers, which are not known
        self._given = {given.value for given in flow.inputs}  # what inputs hold, and numbers computed from it
        self._factors: dict[ir.Value, float] = {}  # product of the constants that numbers were computed with

    def visit(self, node: ir.Node) -> None:
        """Follow the numbers through a node."""
        outputs = [value for value in node.outputs if self._flow.kinds.get(value) is ValueKind.CONTEXT]
        operator = operator_of(node)
        if operator is None or not outputs or has_trait(node, Trait.SHAPE_ONLY):
            return
        if not self._given.isdisjoint(content_inputs(node)):
            self._given.update(outputs)
        first = has_trait(node, Trait.LOOKUP, Trait.PARAMETERIZED)
        others = operator.extent_inputs | operator.type_only
        read = node.inputs[:1] if first else [one for index, one in enumerate(node.inputs) if index not in others]
        fact = self._flow.shapes[outputs[0]]
        keeps = has_trait(node, Trait.IDENTITY, Trait.REARRANGE)
        computes = not keeps and has_trait(node, Trait.ELEMENTWISE, Trait.BROADCAST)
        if any(value in self._computed for value in read) and (keeps or computes):
            self._computed.update(outputs)
        elif any(map(self.counts, read)):
            self._direct.update(outputs if keeps else ())
            self._computed.update(outputs if computes and fact.value is None else ())
        if (keeps or computes) and fact.value is None and fact.dtype is not ir.DataType.BOOL:
            factor = self.threshold(node)
            if factor and not keeps and not has_trait(node, Trait.ARITHMETIC):
                factor = math.inf
            self._factors |= dict.fromkeys(outputs, factor) if factor else {}

    def counts(self, value: ir.Value | None) -> bool:
        """Return whether a value holds the number of sequences, or a number for each of them."""
        fact = None if value is None else self._flow.shapes.facts.get(value)
        if fact is None or is_token(self._flow, value):
            return False
        numbers = _expressions(fact)
        if fact.value is None or not dim.all_known(numbers):
            symbols = {symbol for size in fact.shape or () for symbol in getattr(size, "free_symbols", ())}
            if symbols == {BATCH} or value in self._direct:
                return True
        return any(dim.contains(number, BATCH) for number in numbers)

    def threshold(self, node: ir.Node, *, looks_up: bool = False) -> float:
        """Return the largest number of sequences at which the result of a node may change; 0 if it holds none.

        It is infinite if the number went through a function whose values are not known, such as a root.
        """
        factors = [factor for value in node.inputs if (factor := self._factor(value))]
        if not factors:
            return 0.0
        table = node.inputs[0] if looks_up else None
        rows = [] if table is None else [size for size in self._flow.shapes[table].shape or () if isinstance(size, int)]
        return math.prod(factors) * max([_largest_factor(_constants(node)), *rows])

    def _factor(self, value: ir.Value | None) -> float:
        """Return the product of the constants that a count of sequences was computed with; 0 if a value holds none."""
        if value is None or not (value in self._factors or (value not in self._given and self.counts(value))):
            return 0.0
        atoms = [one.atoms(sympy.Number) for one in _expressions(self._flow.shapes[value])]
        known = [math.prod(_largest_factor([float(number)]) for number in one) for one in atoms]
        return max(known, default=self._factors.get(value, 1.0))

    def compares_computed(self, node: ir.Node) -> bool:
        """Return whether a node compares what is computed from the number of sequences with what any size may give."""
        if any(value in self._computed for value in node.inputs):
            return True
        facts = [self._flow.shapes[value] for value in node.inputs if value is not None]
        numbers = [number for fact in facts if fact.value is not None for number in fact.value.flat]
        computed = [one for one in numbers if one != BATCH and BATCH in getattr(one, "free_symbols", ())]
        others = [int(number) for number in numbers if isinstance(number, int | np.integer)]
        return any(not one.is_positive or max(others, default=1) > 0 for one in computed)

    def is_of_tokens(self, node: ir.Node) -> bool:
        """Return whether the result of a node has an axis of tokens, as the rows of positions have."""
        sizes = self._flow.shapes[node.outputs[0]].shape or ()
        return any(LENGTH in getattr(size, "free_symbols", ()) for size in sizes)

    def looks_up(self, node: ir.Node) -> bool:
        """Return whether the number of sequences selects elements of a constant."""
        source, *places = *node.inputs, None
        is_constant = source is not None and source not in self._flow.kinds
        selects = is_constant and has_trait(node, Trait.LOOKUP, Trait.SELECT)
        return selects and any(value in self._computed or self.counts(value) for value in places)
