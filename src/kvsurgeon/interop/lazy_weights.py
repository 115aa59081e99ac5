"""Weights of a graph that is converted to onnx-graphsurgeon: they are read when a function reads their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues

LOCATION = "kvsurgeon:weight"  # never a file: the offset is the index in a `WeightTable`


class LazyWeight(LazyValues):  # type: ignore[misc]  # onnx-graphsurgeon is not typed
    """The values of a `gs.Constant` for an initializer of the model.

    Attributes:
        weight: The tensor of the initializer.
        index: Its index in the weight table.
        loaded: A copy of its content that a function may have changed; None if it was not read.
    """

    def __init__(self, proto: onnx.TensorProto, weight: ir.TensorProtocol, index: int) -> None:
        super().__init__(proto)
        self.weight = weight
        self.index = index
        self.loaded: np.ndarray[Any, Any] | None = None

    def load(self) -> np.ndarray[Any, Any]:
        """Return a writable copy of the weight."""
        self.loaded = np.array(self.weight.numpy())
        return self.loaded

    def is_unchanged(self) -> bool:
        """Return whether the copy still has the content of the weight."""
        return self.loaded is None or self.loaded.tobytes() == np.asarray(self.weight.numpy()).tobytes()


class WeightTable:
    """The tensors of a model by index; protos have placeholders with the index in their place."""

    def __init__(self) -> None:
        self._tensors: list[ir.TensorProtocol] = []
        self._lazy: list[LazyWeight] = []

    def placeholder(self, value: ir.Value) -> ir.ExternalTensor:
        """Add the tensor of an initializer, and return its placeholder."""
        assert value.const_value is not None
        return self._add(value.const_value, value.name or "")

    def bind(self, constant: gs.Constant) -> None:
        """Make a constant with a placeholder read the weight when its values are read."""
        values = constant._values
        if isinstance(values, LazyWeight):
            return
        index = _index(ir.serde.deserialize_tensor(values.tensor))
        if index is not None:
            constant._values = LazyWeight(values.tensor, self._tensors[index], index)
            self._lazy.append(constant._values)

    def export(self, constant: gs.Constant) -> tuple[int, onnx.TensorProto]:
        """Return the index and the placeholder of a constant; those of the original weight if it is unchanged."""
        values = self._original_values(constant)
        if isinstance(values, LazyWeight):
            proto = onnx.TensorProto()
            proto.CopyFrom(values.tensor)
            proto.name = constant.name
            return values.index, proto
        placeholder = self._add(_tensor(constant), constant.name)
        return len(self._tensors) - 1, ir.to_proto(placeholder)

    def restore(self, graph: ir.Graph) -> None:
        """Replace all placeholders by their tensors."""
        for value in graph.initializers.values():
            index = _index(value.const_value)
            if index is not None:
                value.const_value = self._tensors[index]

    def _original_values(self, constant: gs.Constant) -> Any:
        for values in self._lazy:
            if values.loaded is not None and values.loaded is constant._values and values.is_unchanged():
                return values
        return constant._values

    def _add(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        self._tensors.append(tensor)
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(LOCATION, len(self._tensors) - 1, 0, tensor.dtype, shape=shape, name=name)


def _index(tensor: ir.TensorProtocol | None) -> int | None:
    """Return the index of a placeholder; None for other tensors."""
    if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == LOCATION:
        return tensor.offset or 0
    return None


def _tensor(constant: gs.Constant) -> ir.TensorProtocol:
    if isinstance(constant._values, LazyValues):
        return ir.serde.deserialize_tensor(constant._values.tensor)
    array = np.asarray(constant._values)
    export_dtype = constant._export_dtype
    if export_dtype is not None:
        is_number = isinstance(export_dtype, int)
        dtype = ir.DataType(export_dtype) if is_number else ir.DataType.from_numpy(np.dtype(export_dtype))
        array = array.astype(dtype.numpy())
    if array.dtype == object:
        return ir.serde.deserialize_tensor(onnx.numpy_helper.from_array(array, constant.name))
    return ir.Tensor(array, name=constant.name)
