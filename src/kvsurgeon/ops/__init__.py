"""The operator table: what each operator does to shapes, axes and lengths."""

from kvsurgeon.ops.operator import AttentionInputs, AxisLinks, Operator, Trait, UntraceableAxesError
from kvsurgeon.ops.table import axis_links, contraction_of, find, has_trait, names_with, operator_of, registered

__all__ = [
    "AttentionInputs",
    "AxisLinks",
    "Operator",
    "Trait",
    "UntraceableAxesError",
    "axis_links",
    "contraction_of",
    "find",
    "has_trait",
    "names_with",
    "operator_of",
    "registered",
]
