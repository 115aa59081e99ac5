"""Operators by how they use their inputs."""

from __future__ import annotations

# Operators that read only the shape of their input.
SHAPE_ONLY = frozenset({"Shape", "Size", "ConstantOfShape", "EyeLike"})
