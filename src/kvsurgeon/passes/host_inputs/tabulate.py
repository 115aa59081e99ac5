"""What context is, measured by running it: rows for places, masks by distance, columns for keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.passes.host_inputs.boundary import cone_of

ValueKind = Literal["mask", "rows", "columns"]
Array = npt.NDArray[Any]
OperatorCall = tuple[int, int]  # past and new tokens

PROBES: tuple[OperatorCall, OperatorCall] = ((11, 7), (4, 13))  # no size of one is a size of the other, alone or in sum


@dataclass(frozen=True, kw_only=True)
class Context:
    """One value that the host is to give.

    Attributes:
        value: It.
        kind: Whether it is for queries against keys, for new tokens, or for keys.
        ones: Its axes of size 1, the batch's among them.
        table: `[heads, places, places]` of a mask, `[places, features]` of rows, `[heads, places]` of columns.
    """

    value: ir.Value
    kind: ValueKind
    ones: tuple[int, ...]
    table: Array


class Laboratory:
    """Runs the context of a graph that has a cache, at any lengths, without padding."""

    def __init__(self, graph: ir.Graph, values: Sequence[ir.Value], text: ir.Value, cache: Sequence[ir.Value]) -> None:
        self.values = values
        self.text = text
        self.cache = set(cache)
        self.nodes = set(cone_of(values))
        self.inputs = [value for value in graph.inputs if any(node in self.nodes for node, _ in value.uses())]
        self._session = self._open(graph)

    def _open(self, graph: ir.Graph) -> onnxruntime.InferenceSession:
        cone = onnx.GraphProto(name="context")
        cone.node.extend(ir.to_proto(node) for node in graph if node in self.nodes)
        read = {value for node in self.nodes for value in node.inputs if value is not None}
        for value in graph.initializers.values():
            tensor = constant_tensor(value)
            if value in read and tensor is not None:
                cone.initializer.append(ir.to_proto(ir.Tensor(np.asarray(tensor.numpy()), name=value.name)))
        for value in self.inputs:
            rank = len(value.shape or ())
            cone.input.append(
                onnx.helper.make_tensor_value_info(value.name or "", int(value.dtype or 1), [None] * rank)
            )
        cone.output.extend(onnx.ValueInfoProto(name=value.name) for value in self.values)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        model = onnx.helper.make_model(cone, opset_imports=opsets, ir_version=10)
        try:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        except Exception as error:
            raise _cannot_run(error) from error

    def run(self, call: OperatorCall) -> list[Array]:
        """Return the values in a call without padding.

        Raises:
            UnsupportedError: onnxruntime cannot run it.
        """
        feeds = {value.name or "": self._feed(value, *call) for value in self.inputs}
        try:
            return list(self._session.run(None, feeds))
        except Exception as error:
            raise _cannot_run(error) from error

    def can_run(self, call: OperatorCall) -> bool:
        """Whether the graph has rows for so many tokens."""
        try:
            self.run(call)
        except UnsupportedError:
            return False
        return True

    def _feed(self, given: ir.Value, past: int, new: int) -> Array:
        """Tokens and caches of any content, as their shapes alone are read; places from `past` on; ones for masks."""
        assert given.dtype is not None
        dtype, rank = given.dtype.numpy(), len(given.shape or ())
        if given in self.cache:
            names = [None if isinstance(size, int) else size.value for size in given.shape or ()]
            sizes = {"batch_size": 1, "past_sequence_length": past}
            usual = [size if isinstance(size, int) else 1 for size in given.shape or ()]
            return np.zeros([sizes.get(str(name), size) for name, size in zip(names, usual, strict=True)], dtype)
        if given is self.text:
            width = [1] * (rank - 2)
            return np.zeros([1, new, *width], dtype)
        size = given.shape[1] if given.shape is not None and rank == 2 else None
        name = None if size is None or isinstance(size, int) else size.value
        if name == "total_sequence_length":
            return np.ones([1, past + new], dtype)
        if name == "sequence_length":
            return np.arange(past, past + new, dtype=dtype)[None]
        raise UnsupportedError("what a host gives for this input is not known", at=given.name, found=str(given.shape))


def measure(laboratory: Laboratory, places: int) -> list[Context]:
    """Return what the host must give for texts of up to so many tokens; values without tokens are left out.

    Raises:
        UnsupportedError: A value depends on more than the places of queries and keys.
    """
    probes = [laboratory.run(call) for call in PROBES]
    whole = laboratory.run((0, places))
    found = []
    for index, value in enumerate(laboratory.values):
        axes = _axes([probe[index].shape for probe in probes])
        if axes not in _KINDS and not _differs(whole[index], axes):
            continue  # the same for all tokens, and only repeated for them
        kind = _kind(value, axes, probes[0][index].shape)
        if kind is None:
            continue
        table = _squeezed(whole[index])
        for (past, new), probe in zip(PROBES, probes, strict=True):
            if not _agree(_squeezed(probe[index]), _part(table, kind, past, new)):
                raise UnsupportedError(
                    "context depends on more than places, so that no host can give it", at=value.name
                )
        ones = tuple(axis for axis, size in enumerate(probes[0][index].shape) if size == 1)
        found.append(Context(value=value, kind=kind, ones=ones, table=table))
    return found


_KINDS: dict[str, ValueKind | None] = {
    "_": None, "F": None, "S": "rows", "SF": "rows", "T": "columns", "FT": "columns", "ST": "mask", "FST": "mask",
}  # fmt: skip


def _axes(shapes: Sequence[tuple[int, ...]]) -> str:
    """What a value's axes are, told by its sizes in two calls: size 1 is left out, and sizes that differ are places.

    `S` is new tokens, `T` all tokens, `F` features, and `M` tokens mixed with something else, as heads are.
    """
    (past, new), (other_past, other_new) = PROBES
    lengths = {(new, other_new): "S", (past + new, other_past + other_new): "T", (1, 1): ""}
    named = [lengths.get((one, other), "F" if one == other else "M") for one, other in zip(*shapes, strict=True)]
    return "".join(named) or "_"


def _differs(array: Array, axes: str) -> bool:
    """Whether a value has other numbers for other tokens."""
    squeezed = _squeezed(array)
    return any((squeezed != squeezed.take([0], axis=place)).any() for place, axis in enumerate(axes) if axis in "STM")


def _kind(value: ir.Value, axes: str, shape: tuple[int, ...]) -> ValueKind | None:
    """For which tokens a value is; None for none."""
    if axes not in _KINDS:
        raise UnsupportedError(
            "context lies in a way that no host is told of", at=value.name,
            expected="[heads, queries, keys], [tokens, features] or [heads, keys]", found=str(list(shape)),
        )  # fmt: skip
    return _KINDS[axes]


def _squeezed(array: Array) -> Array:
    return array.reshape([size for size in array.shape if size != 1])


def _agree(one: Array, other: Array) -> bool:
    """Whether two calls gave the same numbers; products of other shapes are summed in another order."""
    exact = not np.issubdtype(one.dtype, np.floating)
    return bool(np.array_equal(one, other) if exact else np.allclose(one, other, rtol=1e-3, atol=1e-5))


def _part(table: Array, kind: ValueKind, past: int, new: int) -> Array:
    if kind == "mask":
        return table[..., past : past + new, : past + new]
    return table[past : past + new] if kind == "rows" else table[..., : past + new]


def _cannot_run(error: Exception) -> UnsupportedError:
    return UnsupportedError(
        "context cannot be run to see what a host must give", found=" ".join(str(error).split())[:200]
    )
