"""Sizes of the symbolic dimensions of a model's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.rewrite.cache_metadata import KEY, read_cache_metadata

_OF_CACHE = frozenset({"max_length", "cache_length", "past_sequence_length", "total_sequence_length"})


def is_static(graph: ir.Graph) -> bool:
    """Return whether all inputs have a static shape."""
    return not _symbols(value for value in graph.inputs if not value.is_initializer())


def dimension_sizes(model: ir.Model, *, tokens: int, max_length: int | None, batch_size: int) -> dict[str, int]:
    """Return the size of each symbolic dimension by its name.

    Raises:
        UnsupportedError: A dimension has no fixed size, or the maximum length is missing or too large.
    """
    metadata = read_cache_metadata(model)
    limit = None if metadata is None else metadata.max_length
    if limit is not None and max_length is not None and max_length > limit:
        raise UnsupportedError(
            "max-length exceeds the maximum length of the model", code=Code.LENGTH_LIMIT, at=KEY,
            expected=f"max-length of at most {limit}", found=str(max_length),
        )  # fmt: skip
    sizes = {"batch_size": batch_size, "sequence_length": tokens}
    has_cache = not _symbols(model.graph.inputs).isdisjoint(_OF_CACHE)
    if has_cache and max_length is None:
        raise UnsupportedError(
            "the KV cache has a symbolic length", code=Code.PASS_PRECONDITION, expected="max-length", found="none"
        )
    if max_length is not None:
        sizes |= {"max_length": max_length, "cache_length": max_length - tokens}
    if not has_cache:
        sizes |= _sizes_of_export(model.graph, tokens, batch_size)
    for value in model.graph.inputs:
        if dynamic := _symbols([value]) - set(sizes):
            raise UnsupportedError(
                "cannot fix a dimension that differs between calls", code=Code.PASS_PRECONDITION, at=value.name,
                found=", ".join(sorted(dynamic)),
                hint="inject with cache=static or new-tokens, and past-length=input or positions",
            )  # fmt: skip
    return sizes


def set_sizes(graph: ir.Graph, sizes: Mapping[str, int]) -> None:
    """Replace the symbolic dimensions of all inputs and outputs by their sizes."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                size if isinstance(size, int) else sizes.get(str(size.value), size.value) for size in value.shape
            )


def _sizes_of_export(graph: ir.Graph, tokens: int, batch_size: int) -> dict[str, int]:
    """Return the sizes of batch and sequence of a model without a cache, whatever their names."""
    first = next((value.shape for value in graph.inputs if value.shape is not None and len(value.shape) > 1), ())
    sizes = zip(first, (batch_size, tokens), strict=False)
    return {str(size.value): number for size, number in sizes if not isinstance(size, int)}


def _symbols(values: Iterable[ir.Value]) -> set[str]:
    return {str(size.value) for value in values for size in value.shape or () if not isinstance(size, int)}
