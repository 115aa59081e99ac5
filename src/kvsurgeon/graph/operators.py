"""Operators by what they do with what they read."""

from __future__ import annotations

# A tensor whose numbers these read tells nothing but its shape.
SHAPE_ONLY = frozenset({"Shape", "Size", "ConstantOfShape", "EyeLike"})

# The first input is a table, and the second says which of its places are read.
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized", "GatherElements", "GatherND"})
