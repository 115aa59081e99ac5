"""Declared shapes of a decoder with a cache, with the dimension names that runtimes and compilers expect."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.symbolic.dim_names import DimNames, dim_names
from kvsurgeon.symbolic.dimension import LENGTH, MAX, NEW, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis


def dim_names_of_export(shape: Sequence[Dimension], axes: Axes, length: Dimension, total: Dimension) -> DimNames:
    """Return the dimensions of a value of the export at the two lengths.

    Args:
        shape: Shape in the export.
        axes: Sequence axes, each at the length of its variable.
        length: Length of the export.
        total: Length that replaces it everywhere else.
    """
    names = [dim_names([total if size is LENGTH else size])[0] for size in shape]
    for axis in axes:
        is_length = axis.is_plain and shape[axis.axis] == length
        size = NEW if axis.variable.resolved() is Length.NEW else total
        names[axis.axis] = dim_names([size])[0] if is_length else None
    return names


def declare_shapes(analysis: Analysis, total: Dimension, windowed: Collection[ir.Node] = ()) -> None:
    """Declare the shapes of inputs and values, each sequence axis at its length.

    Args:
        analysis: Analysis of the export.
        total: Length for which context is computed.
        windowed: Nodes of attention on the last rows.
    """
    for given in analysis.inputs:
        axes = tuple(SequenceAxis(axis, LengthVariable(length)) for axis, length in given.lengths.items())
        given.value.shape = ir.Shape(dim_names_of_export(given.dimensions, axes, analysis.length, total))
    states = [state for window in analysis.windows for state in window.states]
    states += [state for state, _ in analysis.flow.recurrences]
    shorter = {*windowed, *(node for state in states for node in state.nodes)}
    read = set(upstream(analysis.model.graph.outputs, inputs=content_inputs))
    for node in analysis.flow.order:
        for value in node.outputs:
            if (node in shorter or value not in read) and not value.is_graph_output():
                value.shape = None  # neither new tokens nor all, or as many as whatever its shape is computed from
            else:
                _declare_shape(analysis, value, total)


def _declare_shape(analysis: Analysis, value: ir.Value, total: Dimension) -> None:
    flow, declared = analysis.flow, value.shape
    fact, axes = flow.shapes.facts.get(value), flow.axes.get(value, ())
    if fact is None or fact.shape is None or declared is None or len(fact.shape) != len(declared):
        return
    is_fixed = isinstance(analysis.length, int) and analysis.length in declared
    if is_fixed and flow.kinds.get(value) is ValueKind.CONTEXT:
        value.shape = None  # the fixed length of the export, which is another one if it comes from an input
    elif axes or any(not isinstance(size, int) for size in declared):
        value.shape = ir.Shape(dim_names_of_export(fact.shape, _resolved(axes), analysis.length, total))


def outputs_of_cache_length(analysis: Analysis, total: Dimension) -> dict[str, DimNames]:
    """Return the dimensions of the outputs whose length is that of the cache and not the number of tokens."""
    if total == TOTAL:
        return {}
    found = {}
    for value in analysis.model.graph.outputs:
        fact, axes = analysis.flow.shapes.facts.get(value), _resolved(analysis.flow.axes.get(value, ()))
        has_length = any(axis.variable.resolved() is Length.TOTAL for axis in axes)
        if has_length and value.name is not None and fact is not None and fact.shape is not None:
            found[value.name] = dim_names_of_export(fact.shape, axes, analysis.length, MAX)
    return found


def _resolved(axes: Axes) -> Axes:
    return tuple(axis for axis in axes if axis.variable.resolved() is not None)
