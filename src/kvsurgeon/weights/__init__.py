"""Lazy weights: tensors computed from stored ones when they are read."""

from kvsurgeon.weights.computed_tensor import ComputedTensor, TensorSlice

__all__ = ["ComputedTensor", "TensorSlice"]
