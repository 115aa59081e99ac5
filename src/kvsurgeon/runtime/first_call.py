"""Inputs that a decoder computes in its first call and takes in later ones: keys of cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvsurgeon.runtime.axes import is_cross_attention, present_name
from kvsurgeon.runtime.tensors import ValueInfo, to_runtime

CHOICE = "use_cache_branch"  # bool [1], false in the first call


class FirstCall:
    """Inputs that a decoder ignores in its first call, and takes as that call returned them in later ones.

    Attributes:
        choices: The inputs that tell whether a call is a later one.
        pasts: The inputs that the first call returns, by output.
    """

    def __init__(self, inputs: Sequence[ValueInfo], outputs: Sequence[ValueInfo]) -> None:
        returned = {tensor.name for tensor in outputs}
        self.choices = tuple(tensor for tensor in inputs if tensor.name == CHOICE)
        self.pasts = {
            present_name(tensor): tensor
            for tensor in inputs
            if self.choices and is_cross_attention(tensor) and present_name(tensor) in returned
        }
        self._values: dict[str, Any] = {}

    @property
    def names(self) -> set[str]:
        """Names of all these inputs and outputs."""
        return {*self.pasts, *(tensor.name for tensor in (*self.choices, *self.pasts.values()))}

    def feeds(self, batch: int, *, first: bool) -> dict[str, Any]:
        """Return the inputs of a call; in the first call they are empty."""
        given = {one.name: np.full([dim if isinstance(dim, int) else 1 for dim in one.dims], not first)
                 for one in self.choices}  # fmt: skip
        if first:
            given |= {one.name: np.zeros(_empty(one, batch), one.dtype) for one in self.pasts.values()}
        values = {name: to_runtime(array) for name, array in given.items()}
        return values if first else values | self._values

    def store(self, results: Mapping[str, Any], *, first: bool) -> None:
        """Keep what the first call returned."""
        if first:
            self._values = {past.name: results[present] for present, past in self.pasts.items()}


def _empty(tensor: ValueInfo, batch: int) -> list[int]:
    """Return the shape of keys without rows: the axes without a number are the batch and that of rows."""
    return [dim if isinstance(dim, int) else 0 if axis else batch for axis, dim in enumerate(tensor.dims)]
