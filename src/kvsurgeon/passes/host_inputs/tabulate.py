"""Tables of context, measured by running it: rows by position, masks by query and key, columns by key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.execution import build_model, initializer, open_session
from kvsurgeon.graph.query import producers, upstream

ContextKind = Literal["mask", "rows", "columns"]
Array = npt.NDArray[Any]
RunContext = Callable[[int, int], list[Array]]  # of past and new tokens

PROBES = ((11, 7), (4, 13))  # past and new tokens of two calls; no length of one, or sum, is a length of the other


@dataclass(frozen=True, kw_only=True)
class ContextTable:
    """A value that the application computes.

    Attributes:
        value: The value in the graph.
        kind: Whether it belongs to queries and keys (mask), to new tokens (rows), or to keys (columns).
        unit_axes: Axes of size 1, such as that of the batch.
        table: The numbers: `[heads, positions, positions]` of a mask, `[positions, features]` of rows, `[heads,
            positions]` of columns.
    """

    value: ir.Value
    kind: ContextKind
    unit_axes: tuple[int, ...]
    table: Array


def open_context(
    graph: ir.Graph, values: Sequence[ir.Value], tokens: ir.Value, caches: Sequence[ir.Value]
) -> RunContext:
    """Return a function that computes context values for a call without padding.

    The function raises UnsupportedError if onnxruntime cannot run it.

    Args:
        graph: A graph with a cache.
        values: The values.
        tokens: The token input, whose content is not read.
        caches: The cache inputs, whose content is not read.

    Raises:
        UnsupportedError: onnxruntime cannot load the nodes that compute the values.
    """
    nodes = producers(upstream(values))
    read = {value for node in nodes for value in node.inputs}
    inputs = [value for value in graph.inputs if any(node in nodes for node, _ in value.uses())]
    tensors = {value: constant_tensor(value) for value in graph.initializers.values() if value in read}
    model = build_model(
        [node for node in graph if node in nodes],
        outputs=[value.name for value in values],
        opsets=graph.opset_imports,
        inputs={value.name or "": (int(value.dtype or 1), len(value.shape or ())) for value in inputs},
        initializers=[initializer(value.name, tensor) for value, tensor in tensors.items() if tensor is not None],
    )
    try:
        session = open_session(model)
    except Exception as error:
        raise _cannot_run(error) from error

    def run(past: int, new: int) -> list[Array]:
        feeds = {value.name or "": _feed(value, tokens, caches, past, new) for value in inputs}
        try:
            return list(session.run(None, feeds))
        except Exception as error:
            raise _cannot_run(error) from error

    return run


def can_run(run: RunContext, length: int) -> bool:
    """Return whether the context can be computed for a first call of some length."""
    try:
        run(0, length)
    except UnsupportedError:
        return False
    return True


def _feed(given: ir.Value, tokens: ir.Value, caches: Sequence[ir.Value], past: int, new: int) -> Array:
    """Return an input: zeros for tokens and caches, positions from `past` on, ones for masks."""
    assert given.dtype is not None
    dtype, shape = given.dtype.numpy(), declared_shape(given)
    if given in caches:
        sizes = {"past_sequence_length": past}
        return np.zeros([size if isinstance(size, int) else sizes.get(str(size), 1) for size in shape], dtype)
    if given is tokens:
        return np.zeros([1, new, *[1] * (len(shape) - 2)], dtype)
    name = shape[1] if len(shape) == 2 else None
    if name == "total_sequence_length":
        return np.ones([1, past + new], dtype)
    if name == "sequence_length":
        return np.arange(past, past + new, dtype=dtype)[None]
    raise UnsupportedError(
        "the content of an input is unknown", code=Code.INPUT_ROLE, at=given.name, found=str(given.shape),
        expected="a mask or positions",
    )  # fmt: skip


def tabulate(run: RunContext, values: Sequence[ir.Value], length: int) -> list[ContextTable]:
    """Return the tables of context values for sequences of up to some length; values without tokens are left out.

    Raises:
        UnsupportedError: A value depends on more than the positions of queries and keys.
    """
    probes = [run(past, new) for past, new in PROBES]
    whole = run(0, length)
    found = []
    for index, value in enumerate(values):
        axes = _axes([probe[index].shape for probe in probes])
        if axes not in _KINDS and not _varies(whole[index], axes):
            continue  # equal for all tokens, only repeated for them
        kind = _kind(value, axes, probes[0][index].shape)
        if kind is None:
            continue
        table = _squeezed(whole[index])
        for (past, new), probe in zip(PROBES, probes, strict=True):
            if not _agree(_squeezed(probe[index]), _part(table, kind, past, new)):
                raise UnsupportedError(
                    "context depends on more than positions, so the application cannot compute it",
                    code=Code.PASS_PRECONDITION, at=value.name,
                )  # fmt: skip
        unit_axes = tuple(axis for axis, size in enumerate(probes[0][index].shape) if size == 1)
        found.append(ContextTable(value=value, kind=kind, unit_axes=unit_axes, table=table))
    return found


_KINDS: dict[str, ContextKind | None] = {
    "_": None, "F": None, "S": "rows", "SF": "rows", "T": "columns", "FT": "columns", "ST": "mask", "FST": "mask",
}  # fmt: skip


def _axes(shapes: Sequence[tuple[int, ...]]) -> str:
    """Return a letter for each axis of a value that is not of size 1, by its sizes in two calls.

    `S` is new tokens, `T` past and new tokens, `F` features, and `M` tokens mixed with something else, such as heads.
    """
    (past, new), (other_past, other_new) = PROBES
    lengths = {(new, other_new): "S", (past + new, other_past + other_new): "T", (1, 1): ""}
    letters = [lengths.get((one, other), "F" if one == other else "M") for one, other in zip(*shapes, strict=True)]
    return "".join(letters) or "_"


def _varies(array: Array, axes: str) -> bool:
    """Return whether a value has different numbers for different tokens."""
    squeezed = _squeezed(array)
    return any((squeezed != squeezed.take([0], axis=index)).any() for index, axis in enumerate(axes) if axis in "STM")


def _kind(value: ir.Value, axes: str, shape: tuple[int, ...]) -> ContextKind | None:
    """Return to which tokens a value belongs; None for none."""
    if axes not in _KINDS:
        raise UnsupportedError(
            "context has a layout that cannot be described to the application", code=Code.PASS_PRECONDITION,
            at=value.name, expected="[heads, queries, keys], [tokens, features] or [heads, keys]",
            found=str(list(shape)),
        )  # fmt: skip
    return _KINDS[axes]


def _squeezed(array: Array) -> Array:
    return array.reshape([size for size in array.shape if size != 1])


def _agree(one: Array, other: Array) -> bool:
    """Return whether two calls gave as many numbers, and the same, up to the order of summation."""
    if one.shape != other.shape:
        return False
    is_exact = not np.issubdtype(one.dtype, np.floating)
    return bool(np.array_equal(one, other) if is_exact else np.allclose(one, other, rtol=1e-3, atol=1e-5))


def _part(table: Array, kind: ContextKind, past: int, new: int) -> Array:
    if kind == "mask":
        return table[..., past : past + new, : past + new]
    return table[past : past + new] if kind == "rows" else table[..., : past + new]


def _cannot_run(error: Exception) -> UnsupportedError:
    return UnsupportedError(
        "onnxruntime cannot run the context", code=Code.CONTEXT_NOT_RUNNABLE,
        found=" ".join(str(error).split())[:200],
    )  # fmt: skip
