"""Merges key and value heads in numpy, and leaves the graph alone: every head of a group gets the mean of the group.

An independent implementation of `merge-kv-heads`: it shares no code with it, knows no layout, and measures. Each place
along each axis of each weight is changed, and the original is run: a place that changes a single head of the keys or
values of the first layer that it changes at all makes a feature of that head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from verification.independent_verifier import open_session

TOKENS = 3
LARGEST_AXIS = 600  # places; longer ones are those of vocabularies
Arrays = dict[str, np.ndarray]


class UnknownAttentionError(Exception):
    """The products of attention, or the weights that make their heads, are not where they usually are."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place along an axis of a weight, and the head that it makes."""

    weight: str
    axis: int
    index: int
    layer: int
    kind: str  # "key" or "value"
    head: int


def with_merged_weights(original: onnx.ModelProto, folder: Path, heads: int, count: int) -> onnx.ModelProto:
    """Return the original with other numbers: those with which it computes what merged heads would.

    Raises:
        UnknownAttentionError: It cannot be found out which weights make the heads.
    """
    model = onnx.ModelProto.FromString(original.SerializeToString())
    onnx.load_external_data_for_model(model, str(folder))
    weights = {one.name: numpy_helper.to_array(one).copy() for one in model.graph.initializer}
    groups: dict[tuple[str, int, int, str], dict[int, list[int]]] = {}
    for place in _places(model, weights, heads):
        key = place.weight, place.axis, place.layer, place.kind
        groups.setdefault(key, {}).setdefault(place.head, []).append(place.index)
    found = {(layer, kind) for _, _, layer, kind in groups}
    if len(found) != 2 * len(_operands(model)):
        raise UnknownAttentionError(f"weights found for {sorted(found)}")
    for (name, axis, _, _), made in groups.items():
        _merge(weights[name], axis, made, heads, count)
    for initializer in model.graph.initializer:
        initializer.CopyFrom(numpy_helper.from_array(weights[initializer.name], initializer.name))
    return model


def _merge(weight: np.ndarray, axis: int, made: Mapping[int, list[int]], heads: int, count: int) -> None:
    """Replace the heads of each group by their mean, in place."""
    if sorted(made) != list(range(heads)) or len({len(indices) for indices in made.values()}) != 1:
        raise UnknownAttentionError(f"heads of {sorted(made)}")
    rows = np.moveaxis(weight, axis, 0)
    for first in range(0, heads, heads // count):
        group = range(first, first + heads // count)
        mean = np.mean([rows[made[head]].astype(np.float64) for head in group], axis=0)
        for head in group:
            rows[made[head]] = mean


def _places(model: onnx.ModelProto, weights: Arrays, heads: int) -> Iterator[Place]:
    operands = _operands(model)
    session = _session(model, weights, [name for pair in operands for name in pair])
    given = _question(session)
    before = _heads(session, given, heads)
    noise = np.random.default_rng(0)
    for name, weight in weights.items():
        if weight.dtype not in (np.float32, np.float16) or not weight.size:
            continue
        for axis, size in enumerate(weight.shape):
            if size % heads or size > LARGEST_AXIS:
                continue
            for index in range(size):
                changed = weight.copy()
                rows = np.moveaxis(changed, axis, 0)
                rows[index] += noise.uniform(0.5, 1.0, rows[index].shape).astype(weight.dtype)
                after = _heads(session, {**given, name: changed}, heads)
                found = _first_change(before, after)
                if found is not None:
                    yield Place(weight=name, axis=axis, index=index, **found)


def _first_change(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict | None:
    """The one head of the first layer that differs; None where it is several, or none."""
    for layer in range(len(before) // 2):
        moved = [
            (kind, int(head))
            for kind, one, other in zip(
                ("key", "value"), before[2 * layer : 2 * layer + 2], after[2 * layer : 2 * layer + 2], strict=True
            )
            for head in np.flatnonzero((one != other).any(axis=1))
        ]
        if len(moved) == 1:
            return {"layer": layer, "kind": moved[0][0], "head": moved[0][1]}
        if moved:
            return None
    return None


def _heads(session: ort.InferenceSession, given: Arrays, heads: int) -> list[np.ndarray]:
    """[heads, all that a head holds] of the keys and values of each layer."""
    return [array.reshape(heads, -1) for array in session.run(None, given)]


def _session(model: onnx.ModelProto, weights: Arrays, names: Sequence[str]) -> ort.InferenceSession:
    """The model, giving these values, with every weight an input that need not be given."""
    probe = onnx.ModelProto.FromString(model.SerializeToString())
    inputs = {value.name for value in probe.graph.input}
    for initializer in probe.graph.initializer:
        if initializer.name not in inputs and weights[initializer.name].dtype.kind == "f":
            dims = list(initializer.dims)
            probe.graph.input.append(onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, dims))
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return open_session(probe, Path(), ort.GraphOptimizationLevel.ORT_DISABLE_ALL)


def _question(session: ort.InferenceSession) -> Arrays:
    """Tokens and masks of one short text; lengths that are fixed are kept."""
    given: Arrays = {}
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(bool)": bool}
    for one in (value for value in session.get_inputs() if value.type in kinds):
        if "mask" in one.name or "ids" in one.name:
            shape = [
                size if isinstance(size, int) else (1, TOKENS)[min(place, 1)] for place, size in enumerate(one.shape)
            ]
            array = np.ones(shape, kinds[one.type])
            if "position" in one.name or "mask" not in one.name:
                array = np.broadcast_to(np.arange(shape[-1]), shape).astype(kinds[one.type])
            given[one.name] = array
    if not given:
        raise UnknownAttentionError("no tokens to give")
    return given


def _operands(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Keys and values of each layer, as the products of attention read them."""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.op_type == "Attention" and not node.domain:
            found.append((node.input[1], node.input[2]))
        elif node.op_type == "Softmax":
            product = _product_above(node, makers)
            below = _product_below(node, readers)
            found.append((product.input[1], below.input[1]))
    if not found or any(name not in makers for pair in found for name in pair):
        raise UnknownAttentionError("no attention found")
    return found


def _product_above(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto:
    pending = [node]
    for _ in range(40):
        if not pending:
            break
        one = pending.pop(0)
        if one.op_type in ("MatMul", "FusedMatMul"):
            return one
        pending += [makers[name] for name in one.input[: 1 if one.op_type == "Reshape" else None] if name in makers]
    raise UnknownAttentionError("no product above a softmax")


def _product_below(node: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> onnx.NodeProto:
    pending = [node]
    for _ in range(40):
        if not pending:
            break
        one = pending.pop(0)
        if one.op_type == "MatMul" and one is not node:
            return one
        pending += [reader for name in one.output for reader in readers.get(name, ())]
    raise UnknownAttentionError("no product below a softmax")
