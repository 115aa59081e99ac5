"""The part of a graph that depends on some of its weights, computed in torch; onnxruntime computes the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import STANDARD_DOMAINS, producers, upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.training.torch_operators import OPERATORS, Call, Tensor
from kvsurgeon.weights.mapped import mapped_elements

_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")


@dataclass(frozen=True, kw_only=True)
class TorchGraph:
    """The nodes between some weights and an output.

    Attributes:
        output: The output.
        nodes: The nodes that depend on the weights, in execution order; one that reads only a shape does not.
        constants: Other weights that the nodes read.
        boundary: Other values that the nodes read: none depends on the weights.
    """

    output: ir.Value
    nodes: tuple[ir.Node, ...]
    constants: Mapping[ir.Value, Tensor]
    boundary: tuple[ir.Value, ...]

    @classmethod
    def of(cls, graph: ir.Graph, weights: Collection[ir.Value], output: ir.Value) -> TorchGraph:
        """Return the nodes of a graph between some weights and an output.

        Raises:
            UnsupportedError: Torch cannot compute one of them.
        """
        needed = producers(upstream([output]))
        dependent, nodes = set(weights), []
        for node in graph:
            if node in needed and not dependent.isdisjoint(content_inputs(node)):
                _check_operator(node)
                nodes.append(node)
                dependent.update(node.outputs)
        read = dict.fromkeys(value for node in nodes for value in node.inputs if value and value not in dependent)
        tensors = {value: tensor for value in read if (tensor := constant_tensor(value)) is not None}
        return cls(
            output=output, nodes=tuple(nodes),
            constants={value: to_torch(mapped_elements(tensor)) for value, tensor in tensors.items()},
            boundary=tuple(value for value in read if value not in tensors),
        )  # fmt: skip

    def compute(self, weights: Mapping[ir.Value, Tensor], boundary: Mapping[str, np.ndarray]) -> Tensor:
        """Return the output for some weights, and values of the boundary by name."""
        import torch

        values = {**self.constants, **weights}
        values |= {value: to_torch(boundary[value.name or ""]) for value in self.boundary}
        for node in self.nodes:
            inputs = [None if value is None else values[value] for value in node.inputs]
            found = OPERATORS[node.op_type](Call(node=node, inputs=inputs, torch=torch))
            values.update(zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False))
        return values[self.output]


def to_torch(array: np.ndarray) -> Tensor:
    """Return a copy of an array as a tensor; floating-point numbers as float32."""
    import torch

    return torch.from_numpy(np.array(array, np.float32 if array.dtype.kind not in "biu" else array.dtype, order="C"))


def _check_operator(node: ir.Node) -> None:
    if node.op_type not in OPERATORS or node.domain not in _DOMAINS:
        raise UnsupportedError(
            "cannot train through this operator", code=Code.NOT_TRAINABLE, at=node.outputs[0].name,
            expected=", ".join(sorted(OPERATORS)), found=node.op_type,
        )  # fmt: skip
