"""Batch sizes: the numbers of sequences that context is run with, because it may compare them with a number."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.thresholds import numbers_of
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait, operator_of
from kvsurgeon.symbolic.dimension import BATCH

BATCHES = (3, 5)  # sequences that context is run with, in addition to two
MAX_BATCH = 16  # sequences; context is run with no more, although it may compare their number with a larger one


def batch_sizes(flow: TokenFlow) -> tuple[int, ...]:
    """Return the batch sizes to run context with, in addition to two: some, and those near thresholds."""
    if flow.batch is not BATCH:
        return ()
    near: set[int] = set()
    found = _Counts(flow)
    for node in flow.order:
        found.visit(node)
        compares = has_trait(node, Trait.LENGTH_SENSITIVE) and not has_trait(node, Trait.SCALE, Trait.ADD)
        if compares and any(map(found.counts, node.inputs)):
            numbers = {int(number) for value in node.inputs for number in numbers_of(small_constant(value))}
            near |= {number + more for number in numbers for more in (0, 1, 2)}  # an index is less than a size
        if (compares and found.compares_computed(node)) or found.looks_up(node):
            near |= set(range(MAX_BATCH + 1))
    return tuple(sorted({*BATCHES, *(batch for batch in near if BATCHES[0] < batch <= MAX_BATCH)}))


class _Counts:
    """Context that holds the number of sequences, or a number for each, and what arithmetic makes of it."""

    def __init__(self, flow: TokenFlow) -> None:
        self._flow = flow
        self._direct: set[ir.Value] = set()  # the same numbers, elsewhere
        self._computed: set[ir.Value] = set()  # other numbers, which are not known

    def visit(self, node: ir.Node) -> None:
        """Follow the numbers through a node."""
        outputs = [value for value in node.outputs if self._flow.kinds.get(value) is ValueKind.CONTEXT]
        operator = operator_of(node)
        if operator is None or not outputs or has_trait(node, Trait.SHAPE_ONLY):
            return
        first = has_trait(node, Trait.LOOKUP, Trait.PARAMETERIZED)
        others = operator.extent_inputs | operator.type_only
        read = node.inputs[:1] if first else [one for index, one in enumerate(node.inputs) if index not in others]
        keeps = has_trait(node, Trait.IDENTITY, Trait.REARRANGE)
        computes = not keeps and has_trait(node, Trait.ELEMENTWISE, Trait.BROADCAST)
        if any(value in self._computed for value in read) and (keeps or computes):
            self._computed.update(outputs)
        elif any(map(self.counts, read)):
            self._direct.update(outputs if keeps else ())
            known = self._flow.shapes[outputs[0]].value is not None
            self._computed.update(outputs if computes and not known else ())

    def counts(self, value: ir.Value | None) -> bool:
        """Return whether a value holds the number of sequences, or a number for each of them."""
        fact = None if value is None else self._flow.shapes.facts.get(value)
        if fact is None:
            return False
        sizes = fact.shape or ()
        symbols = {symbol for size in sizes for symbol in getattr(size, "free_symbols", ())}
        numbers = () if fact.value is None else fact.value.reshape(-1)
        has_one_for_each = symbols == {BATCH} or value in self._direct
        return has_one_for_each or any(BATCH in getattr(number, "free_symbols", ()) for number in numbers)

    def compares_computed(self, node: ir.Node) -> bool:
        """Return whether a node compares what is computed from the number of sequences with what any size may give."""
        if any(value in self._computed for value in node.inputs):
            return True
        facts = [self._flow.shapes[value] for value in node.inputs if value is not None]
        numbers = [number for fact in facts if fact.value is not None for number in fact.value.flat]
        computed = [one for one in numbers if one != BATCH and BATCH in getattr(one, "free_symbols", ())]
        others = [int(number) for number in numbers if isinstance(number, int | np.integer)]
        return any(not one.is_positive or max(others, default=1) > 0 for one in computed)

    def looks_up(self, node: ir.Node) -> bool:
        """Return whether the number of sequences selects elements of a constant."""
        source, *places = *node.inputs, None
        is_constant = source is not None and source not in self._flow.kinds
        selects = is_constant and has_trait(node, Trait.LOOKUP, Trait.SELECT)
        return selects and any(value in self._computed or self.counts(value) for value in places)
