"""Run a piece of a graph without its weights: what context computes can be looked at, not only reasoned about.

Numbers that follow from shapes are fed, weights are replaced by noise of their shape, and token data by noise too.
bfloat16 is run as float32, because runtimes lack kernels for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from kvsurgeon.analysis.probe_inputs import (
    at_length,
    batch_axis,
    evaluated,
    is_decided,
    mask,
    noise,
    runs_as,
    side_by_side,
    type_run_as,
)
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import BATCH, Dimension

COUNTS_UP = "positions that are given count up from token to token"
INT64 = ir.DataType.INT64
LARGEST_NOISE = 1 << 24  # elements of a weight that is replaced by noise


Feed = Callable[[int], np.ndarray]  # of the length


@dataclass(kw_only=True)
class SubgraphRunner:
    """A piece of a graph that ends in some values, and everything it must be fed.

    Attributes:
        outputs: The values to look at.
        stand_ins: Token values that are fed with noise, each with its axes, instead of being computed.
        stops: Nodes beyond which nothing is computed from stand-ins.
    """

    flow: TokenFlow
    inputs: Sequence[InputRole]
    opsets: Mapping[str, int]
    outputs: Sequence[ir.Value]
    stand_ins: frozenset[ir.Value] = frozenset()
    stops: frozenset[ir.Node] = frozenset()
    nodes: list[ir.Node] = field(default_factory=list, init=False)
    feeds: dict[str, Feed] = field(default_factory=dict, init=False)
    masks: list[InputRole] = field(default_factory=list, init=False)
    _types: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)
    _initializers: list[onnx.TensorProto] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._given = {given.value: given for given in self.inputs}
        self.stand_ins = frozenset(value for value in self.stand_ins if not self._holds_places(value))
        self._computed = downstream(self.stand_ins, self.stops)
        self._collect()
        self._session = self._open()

    @property
    def maskable_rows(self) -> tuple[int, ...]:
        """The sequences of the batch that an input can mask while the other is not."""
        return (0, 1) if any(BATCH in given.dimensions and given.lengths for given in self.masks) else ()

    def _collect(self) -> None:
        seen: set[ir.Value | ir.Node] = set()
        pending = list(self.outputs)
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            if self._is_leaf(value):
                continue
            node = value.producer()
            if node is None:
                raise UnsupportedError("a value is made outside the graph", at=value.name)
            if node not in seen:
                seen.add(node)
                self.nodes.append(node)
                pending += [source for source in node.inputs if source is not None]
        self.nodes.sort(key=lambda node: self.flow.order[node])

    def _is_leaf(self, value: ir.Value) -> bool:
        fact = self.flow.shapes[value]
        if value in self.stand_ins:
            self._feed(value, fact.dtype, fact.shape, self._noise(value, fact.shape, fact.dtype))
        elif constant_tensor(value) is not None:
            self._constant(value)
        elif value in self._given and self._given[value].holds_places:
            self._places(self._given[value])
        elif value in self._given:
            self.masks.append(self._given[value])
            self._types[value.name or ""] = (int(value.dtype or 1), len(self._given[value].dimensions))
        elif fact.value is not None and fact.dtype is not None and is_decided(fact.value):
            numbers, dtype = fact.value, fact.dtype
            self._feed(value, dtype, numbers.shape, lambda length: evaluated(numbers, length).astype(runs_as(dtype)))
        elif (
            self.flow.kinds.get(value) is ValueKind.TOKEN
            and value not in self._computed
            and not self._holds_places(value)
        ):
            self._feed(value, fact.dtype, fact.shape, self._noise(value, fact.shape, fact.dtype))
        else:
            return False
        return True

    def _holds_places(self, value: ir.Value) -> bool:
        """Whether what is said of tokens is made of nothing but the places that are given."""
        if value in self._given:
            return self._given[value].holds_places
        node = value.producer()
        if node is None or has_trait(node, Trait.PRODUCT, Trait.LOOKUP):
            return False
        tokens = [
            source for source in node.inputs if source is not None and self.flow.kinds.get(source) is ValueKind.TOKEN
        ]
        return bool(tokens) and all(self._holds_places(source) for source in tokens)

    def _places(self, given: InputRole) -> None:
        """Places count up from 0."""
        self.flow.assumed.setdefault(COUNTS_UP, given.value.name or "")

        def feed(length: int) -> np.ndarray:
            sizes = [int(at_length(size, length)) for size in given.dimensions]
            shape = [length if axis in given.lengths else 1 for axis in range(len(sizes))]
            return np.broadcast_to(np.arange(length).reshape(shape), sizes).astype(runs_as(given.value.dtype or INT64))

        self._feed(given.value, given.value.dtype, given.dimensions, feed)

    def _constant(self, value: ir.Value) -> None:
        tensor = constant_tensor(value)
        assert tensor is not None
        name = value.name or ""
        if not is_weight(tensor) or (tensor.size <= LARGEST_NOISE and not isinstance(tensor, ir.ExternalTensor)):
            array = np.asarray(tensor.numpy())
            if tensor.dtype is ir.DataType.BFLOAT16:
                array = array.astype(np.float32)
            proto = ir.to_proto(ir.Tensor(array, name=name)) if tensor.dtype is not ir.DataType.STRING else None
            if proto is not None:
                self._initializers.append(proto)
            return
        if tensor.size > LARGEST_NOISE:
            raise UnsupportedError("context reads a table too large to be tried with noise", at=name)
        shape = tuple(tensor.shape.numpy())
        self._feed(value, tensor.dtype, shape, self._noise(value, shape, tensor.dtype))

    def _feed(self, value: ir.Value, dtype: ir.DataType | None, shape: Sequence[Any] | None, feed: Feed) -> None:
        if dtype is None or shape is None:
            raise UnsupportedError("the type of a value is unknown", at=value.name)
        self.feeds[value.name or ""] = feed
        self._types[value.name or ""] = (type_run_as(dtype), len(shape))

    def _noise(
        self, value: ir.Value, shape: Sequence[Dimension] | None, dtype: ir.DataType | None,
        places: np.ndarray | None = None,
    ) -> Feed:  # fmt: skip
        """Noise that is the same for the same tokens, whatever the length."""
        axes = self.flow.axes.get(value, ())

        def feed(length: int) -> np.ndarray:
            sizes = [int(at_length(size, length)) for size in shape or ()]
            return noise(sizes, axes, np.arange(length) if places is None else places, dtype)

        return feed

    def _open(self) -> onnxruntime.InferenceSession:
        graph = onnx.GraphProto(name="experiment")
        for node in self.nodes:
            proto = ir.to_proto(node)
            for attribute in proto.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.BFLOAT16:
                    attribute.i = onnx.TensorProto.FLOAT
                if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.BFLOAT16:
                    array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                    attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
            proto.output[:] = [
                f"{name}.computed" if name in self._types else name for name in proto.output
            ]  # it is fed
            graph.node.append(proto)
        graph.initializer.extend(self._initializers)
        for name, (dtype, rank) in self._types.items():
            graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, [None] * rank))
        for value in self.outputs:
            graph.output.append(onnx.ValueInfoProto(name=value.name))
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(
        self,
        length: int,
        seen: Callable[[int], np.ndarray],
        *,
        through: InputRole | None = None,
        row: int | None = None,
        loudness: float = 1.0,
        places: np.ndarray | None = None,
        beside: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Return the outputs for two sequences of that length.

        Args:
            length: Number of tokens.
            seen: Which tokens are seen, for inputs that are given for all tokens so far: [length] of bool.
            through: The one input that says so; all of them where none is named.
            row: The one sequence of which it says so; both where none is given.
            loudness: What the noise in place of stand-ins is multiplied with.
            places: The place that each token's noise belongs to, where it is not its own: [length].
            beside: The same for the second sequence, where it is another one.
        """
        feeds = {name: np.asarray(feed(length)) for name, feed in self.feeds.items()}
        if places is not None:
            for value in self.stand_ins:
                fact = self.flow.shapes[value]
                mine = self._noise(value, fact.shape, fact.dtype, places)(length)
                theirs = mine if beside is None else self._noise(value, fact.shape, fact.dtype, beside)(length)
                feeds[value.name or ""] = side_by_side(mine, theirs, batch_axis(fact.shape))
        if loudness != 1.0:
            for value in self.stand_ins:
                array = feeds[value.name or ""]
                feeds[value.name or ""] = (array * loudness).astype(array.dtype)
        for given in self.masks:
            here = seen(length) if through in (None, given) else np.ones(length, dtype=bool)
            feeds[given.value.name or ""] = mask(given, here, row)
        arrays = [np.asarray(array) for array in self._session.run(None, feeds)]
        for value, array in zip(self.outputs, arrays, strict=True):
            self._check_shape(value, array, length)
        return arrays

    def _check_shape(self, value: ir.Value, array: np.ndarray, length: int) -> None:
        """Hold what was inferred against what ran.

        Raises:
            UnsupportedError: They differ, so nothing that rests on it can be trusted.
        """
        sizes = [at_length(size, length) for size in self.flow.shapes[value].shape or ()]
        known = [isinstance(size, int) for size in sizes]
        if len(sizes) != array.ndim or any(
            k and size != real for k, size, real in zip(known, sizes, array.shape, strict=True)
        ):
            raise UnsupportedError(
                "what was inferred of a shape is not what runs", at=value.name,
                expected=str(sizes), found=str(list(array.shape)),
            )  # fmt: skip


def downstream(values: Iterable[ir.Value], stops: Collection[ir.Node] = ()) -> frozenset[ir.Value]:
    """Return every value that depends on one of these, up to the nodes at which to stop."""
    found: set[ir.Value] = set()
    pending = list(values)
    while pending:
        for node, _ in pending.pop().uses():
            fresh = [] if node in stops else [value for value in node.outputs if value not in found]
            found.update(fresh)
            pending += fresh
    return frozenset(found)
