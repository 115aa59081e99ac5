"""Operators of ONNX in torch: what a model computes between trained weights and its logits.

Each result is compared with that of onnxruntime before anything is trained, so an operator that is computed otherwise
leads to a rejection, not to wrong weights. All floating-point numbers are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import onnx_ir as ir

Tensor = Any  # of torch, which is imported only to train


@dataclass(frozen=True, kw_only=True)
class Call:
    """A node with the tensors that it reads.

    Attributes:
        node: The node.
        inputs: A tensor for each of its inputs; None for those that are left out.
        torch: The module.
    """

    node: ir.Node
    inputs: Sequence[Tensor | None]
    torch: Any

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index]

    def given(self, index: int) -> bool:
        """Return whether the node has an input of this index."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def numbers(self, index: int, name: str) -> list[int] | None:
        """Return integers that an input gives, or an attribute in earlier opsets; None if neither does."""
        if self.given(index):
            return [int(one) for one in self.inputs[index].reshape(-1)]  # type: ignore[union-attr]
        found = self.attribute(name)
        return None if found is None else [int(one) for one in found]


def _clip(call: Call) -> Tensor:
    low = call[1] if call.given(1) else call.attribute("min")
    high = call[2] if call.given(2) else call.attribute("max")
    return call.torch.clamp(call[0], low, high)


def _gemm(call: Call) -> Tensor:
    left = call[0].T if call.attribute("transA", 0) else call[0]
    right = call[1].T if call.attribute("transB", 0) else call[1]
    result = call.attribute("alpha", 1.0) * (left @ right)
    return result + call.attribute("beta", 1.0) * call[2] if call.given(2) else result


def _reshape(call: Call) -> Tensor:
    sizes = [int(one) for one in call[1]]
    if not call.attribute("allowzero", 0):
        sizes = [call[0].shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return call[0].reshape(sizes)


def _squeeze(call: Call) -> Tensor:
    axes = call.numbers(1, "axes")
    return call[0].squeeze() if axes is None else call[0].squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    axes = call.numbers(1, "axes") or []
    rank = call[0].dim() + len(axes)
    result = call[0]
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _expand(call: Call) -> Tensor:
    return call[0].expand(call.torch.broadcast_shapes(call[0].shape, [int(one) for one in call[1]]))


def _slice(call: Call) -> Tensor:
    starts, ends = call.numbers(1, "starts") or [], call.numbers(2, "ends") or []
    axes = call.numbers(3, "axes") or list(range(len(starts)))
    steps = call.numbers(4, "steps") or [1] * len(starts)
    result = call[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        kept = range(result.shape[axis])[start:end:step]
        if step == 1:
            result = result.narrow(axis, kept.start, len(kept))
        else:
            result = result.index_select(axis, call.torch.tensor(list(kept)))
    return result


def _split(call: Call) -> Tensor:
    axis, count = call.attribute("axis", 0), len(call.node.outputs)
    sizes = call.numbers(1, "split")
    if sizes is None:
        largest = -(-call[0].shape[axis] // count)
        sizes = [largest] * (count - 1) + [call[0].shape[axis] - largest * (count - 1)]
    return call.torch.split(call[0], sizes, axis)


def _gather(call: Call) -> Tensor:
    axis, places = call.attribute("axis", 0), call[1].long()
    axis %= call[0].dim()
    places = call.torch.where(places < 0, places + call[0].shape[axis], places)
    found = call[0].index_select(axis, places.reshape(-1))
    return found.reshape(call[0].shape[:axis] + places.shape + call[0].shape[axis + 1 :])


def _flatten(call: Call) -> Tensor:
    axis = call.attribute("axis", 1) % (call[0].dim() + 1)
    return call[0].reshape(int(call.torch.Size(call[0].shape[:axis]).numel()), -1)


def _softmax(call: Call) -> Tensor:
    return call.torch.softmax(call[0], call.attribute("axis", -1))


def _reduced(name: str) -> Callable[[Call], Tensor]:
    def compute(call: Call) -> Tensor:
        axes = call.numbers(1, "axes")
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return call[0]
        function = getattr(call.torch, name)
        return function(call[0], tuple(axes or range(call[0].dim())), keepdim=bool(call.attribute("keepdims", 1)))

    return compute


def _layer_norm(call: Call) -> Tensor:
    first = call.attribute("axis", -1) % call[0].dim()
    result = (
        call.torch.nn.functional.layer_norm(call[0], call[0].shape[first:], eps=call.attribute("epsilon", 1e-5))
        * call[1]
    )
    return result + call[2] if call.given(2) else result


def _rms_norm(call: Call) -> Tensor:
    axes = tuple(range(call.attribute("axis", -1) % call[0].dim(), call[0].dim()))
    power = call[0].pow(2).mean(axes, keepdim=True)
    return call[0] * call.torch.rsqrt(power + call.attribute("epsilon", 1e-5)) * call[1]


def _cast(call: Call) -> Tensor:
    target = ir.DataType(call.attribute("to"))
    if target.is_floating_point():
        return call[0].float()
    return call[0].bool() if target is ir.DataType.BOOL else call[0].long()


def _gelu(call: Call) -> Tensor:
    return call.torch.nn.functional.gelu(call[0], approximate=call.attribute("approximate", "none"))


def _elementwise(name: str) -> Callable[[Call], Tensor]:
    return lambda call: getattr(call.torch, name)(*call.inputs)


def _folded(name: str) -> Callable[[Call], Tensor]:
    return lambda call: reduce(getattr(call.torch, name), call.inputs)


OPERATORS: dict[str, Callable[[Call], Tensor]] = {
    **{name: _elementwise(name.lower()) for name in ("Abs", "Cos", "Erf", "Exp", "Log", "Neg", "Pow")},
    **{name: _elementwise(name.lower()) for name in ("Reciprocal", "Sigmoid", "Sin", "Sqrt", "Tanh")},
    **{name: _elementwise(name.lower()) for name in ("Add", "Sub", "Mul", "Div", "Where", "IsNaN")},
    "MatMul": _elementwise("matmul"),
    "Relu": _elementwise("relu"),
    "Identity": lambda call: call[0],
    "Max": _folded("maximum"),
    "Min": _folded("minimum"),
    "Clip": _clip,
    "Cast": _cast,
    "Gemm": _gemm,
    "Einsum": lambda call: call.torch.einsum(call.attribute("equation"), *call.inputs),
    "Softmax": _softmax,
    "ReduceMean": _reduced("mean"),
    "ReduceSum": _reduced("sum"),
    "ReduceMax": _reduced("amax"),
    "Reshape": _reshape,
    "Transpose": lambda call: call[0].permute(call.attribute("perm") or list(range(call[0].dim()))[::-1]),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
    "Concat": lambda call: call.torch.cat(list(call.inputs), call.attribute("axis")),
    "Gather": _gather,
    "Tile": lambda call: call[0].repeat([int(one) for one in call[1]]),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "Gelu": _gelu,
    "QuickGelu": lambda call: call[0] * call.torch.sigmoid(call.attribute("alpha", 1.702) * call[0]),
}  # fmt: skip
