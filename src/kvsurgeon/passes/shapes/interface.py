"""Inputs and outputs in numbers: what each symbol of a model's interface becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.rewrite.cache_metadata import KEY, CacheMetadata, read_cache_metadata

_HINT = "inject with cache=static or new-tokens, and past-length=input or positions"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The interface of a model, and the number that each of its symbols becomes."""

    model: ir.Model
    numbers: Mapping[str, int]
    note: CacheMetadata | None  # what a host must know that numbers do not tell

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to fix."""
        inputs = [value for value in self.model.graph.inputs if not value.is_initializer()]
        return all(isinstance(size, int) for value in inputs for size in value.shape or ())

    def fix(self) -> None:
        """Let every input and output have a shape of numbers."""
        graph = self.model.graph
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is not None:
                value.shape = ir.Shape([self._number(size) for size in value.shape])

    def _number(self, size: int | ir.SymbolicDim) -> int | str | None:
        return size if isinstance(size, int) else self.numbers.get(str(size.value), size.value)


def read_interface(model: ir.Model, *, tokens: int, max_length: int | None, batch_size: int) -> Interface:
    """Return the interface in numbers.

    Raises:
        UnsupportedError: A symbol has no number.
    """
    note = read_cache_metadata(model)
    longest = None if note is None else note.max_length
    if longest is not None and max_length is not None and max_length > longest:
        raise UnsupportedError(
            "the model cannot be run on as many tokens", at=KEY,
            expected=f"max-length of at most {longest}", found=str(max_length),
        )  # fmt: skip
    numbers = {"batch_size": batch_size, "sequence_length": tokens}
    words = {str(size.value) for value in model.graph.inputs for size in value.shape or () if not isinstance(size, int)}
    cached = words & {"max_length", "cache_length", "past_sequence_length", "total_sequence_length"}
    if cached and max_length is None:
        raise UnsupportedError(
            "the model has a cache, whose length must be fixed too", expected="max-length", found="none"
        )
    if max_length is not None:
        numbers |= {"max_length": max_length, "cache_length": max_length - tokens}
    if not cached:
        numbers |= _numbers_of_an_export(model, tokens, batch_size)
    for value in model.graph.inputs:
        for size in value.shape or ():
            if not isinstance(size, int) and str(size.value) not in numbers:
                raise UnsupportedError(
                    "a size differs from call to call, and cannot be fixed", at=value.name,
                    found=str(size.value), hint=_HINT,
                )  # fmt: skip
    return Interface(model=model, numbers=numbers, note=note)


def _numbers_of_an_export(model: ir.Model, tokens: int, batch_size: int) -> dict[str, int]:
    """An export without a cache calls its batch and its length as it likes."""
    first = next((value for value in model.graph.inputs if value.shape is not None and len(value.shape) > 1), None)
    if first is None or first.shape is None:
        return {}
    sizes = zip(first.shape, (batch_size, tokens), strict=False)
    return {str(size.value): number for size, number in sizes if not isinstance(size, int)}
