"""Weights that are computed from others, when somebody asks for them and not before."""

from kvsurgeon.weights.composed import ComputedTensor, Part

__all__ = ["ComputedTensor", "Part"]
