"""Weights that onnx-graphsurgeon may look at, and that stay where they are until it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues

from kvsurgeon.passes.weightless import Placeholder

LOCATION = "kvsurgeon:held"  # never a file: the tensors stay with the model they came from


class HeldValues(LazyValues):  # type: ignore[misc]  # onnx-graphsurgeon is not typed
    """What a `gs.Constant` holds for one of the model's initializers: read when its values are asked for."""

    def __init__(self, proto: onnx.TensorProto, held: ir.TensorProtocol, index: int) -> None:
        super().__init__(proto)
        self.held = held
        self.index = index
        self.loaded: np.ndarray[Any, Any] | None = None

    def load(self) -> np.ndarray[Any, Any]:
        """Return a copy of the weight, which may then be written to."""
        self.loaded = np.array(self.held.numpy())
        return self.loaded

    def is_as_before(self) -> bool:
        """Whether what was read was left as it is in the model."""
        return self.loaded is None or self.loaded.tobytes() == np.asarray(self.held.numpy()).tobytes()


@dataclass
class Shelf:
    """The tensors that stand-ins stand for, by their index."""

    tensors: list[ir.TensorProtocol] = field(default_factory=list)
    held: list[HeldValues] = field(default_factory=list)

    @property
    def stand_in(self) -> Placeholder:
        """A function that puts an initializer's tensor on the shelf and returns what stands for it."""
        return lambda value: self._put(value.const_value, value.name or "")  # type: ignore[arg-type]

    def lend(self, constant: gs.Constant) -> None:
        """Let `constant`, which holds a stand-in, read the weight that it stands for."""
        values = constant._values
        if isinstance(values, HeldValues):
            return
        index = _index(ir.serde.deserialize_tensor(values.tensor))
        if index is not None:
            constant._values = HeldValues(values.tensor, self.tensors[index], index)
            self.held.append(constant._values)

    def stand_in_for(self, constant: gs.Constant) -> tuple[int, onnx.TensorProto]:
        """Return the index and the stand-in of a constant that comes back: the original's, if its values are."""
        values = self._values(constant)
        if isinstance(values, HeldValues):
            proto = onnx.TensorProto()
            proto.CopyFrom(values.tensor)
            proto.name = constant.name
            return values.index, proto
        stand_in = self._put(_tensor(constant), constant.name)
        return len(self.tensors) - 1, ir.to_proto(stand_in)

    def attach(self, graph: ir.Graph) -> None:
        """Give every initializer that has a stand-in the tensor that it stands for."""
        for value in graph.initializers.values():
            index = _index(value.const_value)
            if index is not None:
                value.const_value = self.tensors[index]

    def _values(self, constant: gs.Constant) -> Any:
        for values in self.held:
            if values.loaded is not None and values.loaded is constant._values and values.is_as_before():
                return values
        return constant._values

    def _put(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        self.tensors.append(tensor)
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(LOCATION, len(self.tensors) - 1, 0, tensor.dtype, shape=shape, name=name)


def _index(tensor: ir.TensorProtocol | None) -> int | None:
    if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == LOCATION:
        return tensor.offset or 0
    return None


def _tensor(constant: gs.Constant) -> ir.TensorProtocol:
    if isinstance(constant._values, LazyValues):
        return ir.serde.deserialize_tensor(constant._values.tensor)
    array = np.asarray(constant._values)
    wanted = constant._export_dtype
    if wanted is not None:
        dtype = ir.DataType(wanted) if isinstance(wanted, int) else ir.DataType.from_numpy(np.dtype(wanted))
        array = array.astype(dtype.numpy())
    if array.dtype == object:
        return ir.serde.deserialize_tensor(onnx.numpy_helper.from_array(array, constant.name))
    return ir.Tensor(array, name=constant.name)
