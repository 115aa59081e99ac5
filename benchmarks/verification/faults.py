"""Caches that are wrong in some calls only: a right cached model, with a fault where a condition on the call holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PLACES = ("logits", "last logit", "past value", "past key", "present value")
SIZES = (1.0, 1e-2, 1e-4)  # of the values, where a fault adds to them
PASTS, CHUNKS, BATCHES, PADS = (0, 14, 64, 100), (2, 4, 8, 9, 33), (1, 2, 4), (0, 6, 12)
LENGTHS = (150, 300, 700)  # that no text passes unless the graph names them


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault in the calls for which all conditions hold.

    Attributes:
        conditions: Quantity of a call, comparison and number: `past > 14`, `chunk = 4`.
        place: Value that is changed.
        size: How much is added, relative to the value; for logits, times the sine of the value.
    """

    conditions: tuple[tuple[str, str, int], ...]
    place: str
    size: float

    def __str__(self) -> str:
        """Return the fault in words."""
        conditions = " and ".join(" ".join(map(str, condition)) for condition in self.conditions)
        return f"{conditions}: {self.place} by {self.size:g}"


def all_faults() -> Iterator[Fault]:
    """Yield every condition at every place, and for each size."""
    past: list[tuple[tuple[str, str, int], ...]] = [(("past", ">", past),) for past in PASTS + LENGTHS]
    chunks = [(("chunk", "=", chunk), ("past", ">", past)) for chunk in CHUNKS for past in (0, 14)]
    chunks += [(("chunk", ">", 1), ("past", ">", past)) for past in PASTS]
    batches = [(("batch", ">", batch),) for batch in BATCHES]
    batches += [(("batch", ">", 1), ("past", ">", past)) for past in PASTS]
    pads = [(("pads", ">", pad),) for pad in PADS] + [(("pads", "=", 1),), (("holes", ">", 0),)]
    pads += [(("pads", ">", 0), ("past", ">", 0)), (("pads", ">", 0), ("chunk", "=", 1))]
    for conditions, place, size in itertools.product([*past, *chunks, *batches, *pads], PLACES, SIZES):
        yield Fault(conditions=conditions, place=place, size=size)


def with_fault(model: onnx.ModelProto, fault: Fault) -> onnx.ModelProto:
    """Return a copy of a cached model with a fault; its inputs and outputs have the names that `inject` gives."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    _FaultWriter(copy.graph).write(fault)
    return copy


class _FaultWriter:
    """Nodes of a fault, added to a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []

    def write(self, fault: Fault) -> None:
        """Add the nodes of a fault."""
        rank = 3 if "logit" in fault.place else 4
        holds = self._op("Identity", self._constant(np.ones([1] * rank, np.float32)))
        for condition in fault.conditions:
            holds = self._op("Mul", holds, self._holds(condition, rank))
        if fault.place.startswith("past"):
            name = next(one.name for one in self.graph.input if one.name.endswith(f"0.{fault.place.split()[1]}"))
            changed = self._changed(name, holds, fault)
            for node in self.graph.node:
                node.input[:] = [changed if read == name and node.op_type != "Shape" else read for read in node.input]
            before, after = self.nodes, list(self.graph.node)
        else:
            name = "logits" if "logit" in fault.place else "present.0.value"
            maker = next(node for node in self.graph.node if name in node.output)
            maker.output[:] = [f"fault.right.{name}" if output == name else output for output in maker.output]
            for node in self.graph.node:
                node.input[:] = [f"fault.right.{name}" if read == name else read for read in node.input]
            changed = self._changed(f"fault.right.{name}", holds, fault)
            self.nodes.append(helper.make_node("Identity", [changed], [name]))
            before, after = list(self.graph.node), self.nodes
        del self.graph.node[:]
        self.graph.node.extend([*before, *after])

    def _changed(self, name: str, holds: str, fault: Fault) -> str:
        wrong = self._op("Sin", name) if "logit" in fault.place else name
        if fault.place == "last logit":
            count = (
                next(one for one in self.graph.output if one.name == "logits").type.tensor_type.shape.dim[-1].dim_value
            )
            wrong = self._op("Mul", wrong, self._constant((np.arange(count) == count - 1).astype(np.float32)))
        size = self._constant(np.float32(fault.size))
        return self._op("Add", name, self._op("Mul", self._op("Mul", holds, size), wrong))

    def _holds(self, condition: tuple[str, str, int], rank: int) -> str:
        quantity, comparison, number = condition
        operator = {"=": "Equal", ">": "Greater"}[comparison]
        found = self._op(operator, self._quantity(quantity), self._constant(np.int64(number)))
        shape = self._constant(np.array([-1, *[1] * (rank - 1)]))
        return self._op("Cast", self._op("Reshape", found, shape), to=TensorProto.FLOAT)

    def _quantity(self, quantity: str) -> str:
        """Return a quantity of the call, a scalar or one for each row."""
        if quantity in ("past", "chunk", "batch"):
            place, axis = {"past": ("past_key_values.0.key", 2), "chunk": ("input_ids", 1), "batch": ("input_ids", 0)}[
                quantity
            ]
            return self._op("Gather", self._op("Shape", place), self._constant(np.int64(axis)))
        mask = "attention_mask"
        if quantity == "pads":
            masked = self._op("Sub", self._constant(np.int64(1)), mask)
        else:  # masked, with a token before
            earlier, zero = self._op("CumSum", mask, self._constant(np.int64(1))), self._constant(np.int64(0))
            both = self._op("And", self._op("Greater", earlier, zero), self._op("Equal", mask, zero))
            masked = self._op("Cast", both, to=TensorProto.INT64)
        return self._op("ReduceSum", masked, self._constant(np.array([1])), keepdims=0)

    def _op(self, operator: str, *inputs: str, **attributes: int) -> str:
        output = f"fault.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def _constant(self, value: np.ndarray | np.generic) -> str:
        name = f"fault.constant.{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name
