"""Subgraph runner: execute the nodes between some values in onnxruntime, without reading weights.

The numbers that follow from shapes are fed, and so are weights and token data, as synthetic values. bfloat16 is run as
float32, because runtimes lack kernels for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import MaskPattern, unmasked
from kvsurgeon.analysis.probe_inputs import (
    at_length,
    batch_axis,
    evaluate,
    follows_from_length,
    join_sequences,
    mask_input,
    position_input,
    run_dtype,
    synthetic_values,
)
from kvsurgeon.analysis.token_data import is_token, token_inputs
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.graph.execution import InputType, build_model, initializer, open_session
from kvsurgeon.graph.query import downstream, upstream
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import BATCH

POSITIONS_COUNT_UP = "position inputs count up by one from token to token"
MAX_WEIGHT_SIZE = 1 << 24  # elements of a weight that is replaced by synthetic values

Feed = Callable[[int], np.ndarray]  # length -> array


class SubgraphRunner:
    """Computes some values of a graph on probe inputs.

    Args:
        flow: The token flow of the graph.
        outputs: The values to compute.
        probed: Token values that are fed with synthetic values instead of being computed.
        stops: Nodes below which nothing is computed from `probed`.
        assumptions: Receives the statements that the results rest on, each with the name of the value it is about.

    Attributes:
        probed: The token values that are fed, without those that are made of positions alone.
        masks: The graph inputs that mask tokens.
        feeds: For each input of the subgraph, by name: its array at a length.

    Raises:
        UnsupportedError: The values cannot be computed without weights.
    """

    def __init__(
        self,
        flow: TokenFlow,
        outputs: Sequence[ir.Value],
        *,
        probed: Iterable[ir.Value] = (),
        stops: Collection[ir.Node] = (),
        assumptions: dict[str, str] | None = None,
    ) -> None:
        self.flow = flow
        self.outputs = outputs
        self.masks: list[InputRole] = []
        self.feeds: dict[str, Feed] = {}
        self._assumptions = {} if assumptions is None else assumptions
        self._roles = {given.value: given for given in flow.inputs}
        self._types: dict[str, InputType] = {}
        self._initializers: list[onnx.TensorProto] = []
        self.probed = frozenset(value for value in probed if not self._is_made_of_positions(value))
        self._computed = set(downstream(self.probed, stop=lambda node: node in stops))
        self._fed: set[ir.Value] = set()
        try:
            nodes = [_without_bfloat16(ir.to_proto(node)) for node in self._nodes()]
            model = build_model(
                nodes, inputs=self._types, outputs=[value.name for value in outputs], opsets=flow.opsets,
                initializers=self._initializers,
            )  # fmt: skip
            self._session = open_session(model)
        except UnsupportedError:
            raise
        except Exception as error:
            raise _not_runnable(outputs[0], error) from error

    @property
    def maskable_sequences(self) -> tuple[int, ...]:
        """Indices of the two sequences if an input can mask tokens of one of them alone."""
        return (0, 1) if any(BATCH in given.dimensions and given.lengths for given in self.masks) else ()

    def _nodes(self) -> list[ir.Node]:
        """Return the nodes to execute, in order, after adding a feed for each value that is not computed."""
        nodes: list[ir.Node] = []
        for value in upstream(self.outputs, stop=lambda value: value in self._fed, inputs=lambda node: node.inputs):
            if self._feed_value(value):
                self._fed.add(value)
            elif (node := value.producer()) is not None:
                nodes.append(node)
            else:
                raise UnsupportedError(
                    "the subgraph reads a value of an outer graph", code=Code.CONTROL_FLOW, at=value.name
                )
        return sorted(dict.fromkeys(nodes), key=lambda node: self.flow.order[node])

    def _feed_value(self, value: ir.Value) -> bool:
        """Add a feed for a value; False if it must be computed."""
        fact, variable, name = self.flow.shapes[value], self._roles.get(value), value.name or ""
        tensor = constant_tensor(value)
        if value in self.probed:
            self._add_synthetic(value)
        elif tensor is not None:
            self._add_constant(value, tensor)
        elif variable is not None and variable.holds_positions:
            self._assumptions.setdefault(POSITIONS_COUNT_UP, name)
            self._add_feed(value, value.dtype, len(variable.dimensions), partial(position_input, variable))
        elif variable is not None:
            self.masks.append(variable)
            self._types[name] = (value.dtype or ir.DataType.FLOAT, len(variable.dimensions))
        elif fact.value is not None and fact.dtype is not None and follows_from_length(fact.value):
            numbers, dtype = fact.value, run_dtype(fact.dtype).numpy()
            self._add_feed(value, fact.dtype, numbers.ndim, lambda length: evaluate(numbers, length).astype(dtype))
        elif is_token(self.flow, value) and value not in self._computed and not self._is_made_of_positions(value):
            self._add_synthetic(value)
        else:
            return False
        return True

    def _is_made_of_positions(self, value: ir.Value) -> bool:
        """Return whether token data is computed from position inputs alone."""
        if value in self._roles:
            return self._roles[value].holds_positions
        node = value.producer()
        if node is None or has_trait(node, Trait.PRODUCT, Trait.LOOKUP):
            return False
        tokens = token_inputs(self.flow, node)
        return bool(tokens) and all(self._is_made_of_positions(source) for source in tokens)

    def _add_constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        if not is_weight(tensor) or (tensor.size <= MAX_WEIGHT_SIZE and not isinstance(tensor, ir.ExternalTensor)):
            if tensor.dtype is ir.DataType.BFLOAT16:
                tensor = ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32))
            if tensor.dtype is not ir.DataType.STRING:
                self._initializers.append(initializer(value.name, tensor))
        elif tensor.size > MAX_WEIGHT_SIZE:
            raise UnsupportedError(
                "context reads a table that is too large to run with synthetic values",
                code=Code.CONTEXT_NOT_RUNNABLE, at=value.name, expected=f"at most {MAX_WEIGHT_SIZE} elements",
                found=str(tensor.size),
            )  # fmt: skip
        else:
            self._add_synthetic(value)

    def _add_synthetic(self, value: ir.Value) -> None:
        fact = self.flow.shapes[value]
        rank = None if fact.shape is None else len(fact.shape)
        self._add_feed(value, fact.dtype, rank, lambda length: self._synthetic(value, np.arange(length)))

    def _synthetic(self, value: ir.Value, tokens: np.ndarray) -> np.ndarray:
        """Return synthetic values for tokens with these numbers."""
        fact = self.flow.shapes[value]
        sizes = [int(at_length(size, len(tokens))) for size in fact.shape or ()]
        return synthetic_values(sizes, self.flow.axes.get(value, ()), tokens, fact.dtype)

    def _add_feed(self, value: ir.Value, dtype: ir.DataType | None, rank: int | None, feed: Feed) -> None:
        if dtype is None or rank is None:
            raise UnsupportedError("the type of a tensor is unknown", code=Code.UNTRACEABLE_SEQUENCE, at=value.name)
        self.feeds[value.name or ""] = feed
        self._types[value.name or ""] = (run_dtype(dtype), rank)

    def run(
        self,
        length: int,
        mask: MaskPattern = unmasked,
        *,
        only_input: InputRole | None = None,
        only_sequence: int | None = None,
        scale: float = 1.0,
        tokens: np.ndarray | None = None,
        second_tokens: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Return the outputs for a batch of two sequences.

        Args:
            length: Number of tokens of each sequence.
            mask: The tokens that the mask inputs mask.
            only_input: The only mask input that masks them; None for all.
            only_sequence: Index of the only sequence that is masked; None for both.
            scale: Factor on the synthetic values of `probed`.
            tokens: [length], the number of the token at each position; 0, 1, 2, ... by default.
            second_tokens: [length], the same for the second sequence if it differs from the first.

        Raises:
            UnsupportedError: The subgraph does not run, or a shape is not the inferred one.
        """
        try:
            feeds = self._probed_feeds(length, scale, tokens, second_tokens)
            for given in self.masks:
                visible = mask(length) if only_input in (None, given) else np.ones(length, dtype=bool)
                feeds[given.value.name or ""] = mask_input(given, visible, only_sequence)
            arrays = [np.asarray(array) for array in self._session.run(None, feeds)]
        except Exception as error:
            raise _not_runnable(self.outputs[0], error) from error
        for value, array in zip(self.outputs, arrays, strict=True):
            self._check_shape(value, array, length)
        return arrays

    def _probed_feeds(
        self, length: int, scale: float, tokens: np.ndarray | None, second_tokens: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        feeds = {name: np.asarray(feed(length)) for name, feed in self.feeds.items()}
        for value in self.probed if tokens is not None or scale != 1.0 else ():
            array = feeds[value.name or ""]
            if tokens is not None:
                array = self._synthetic(value, tokens)
                second = array if second_tokens is None else self._synthetic(value, second_tokens)
                array = join_sequences(array, second, batch_axis(self.flow.shapes[value].shape))
            feeds[value.name or ""] = array if scale == 1.0 else (array * scale).astype(array.dtype)
        return feeds

    def _check_shape(self, value: ir.Value, array: np.ndarray, length: int) -> None:
        sizes = [at_length(size, length) for size in self.flow.shapes[value].shape or ()]
        if len(sizes) != array.ndim or any(
            isinstance(size, int) and size != actual for size, actual in zip(sizes, array.shape, strict=True)
        ):
            raise UnsupportedError(
                "a tensor does not have the inferred shape when it is computed", code=Code.INCONSISTENT_SHAPES,
                at=value.name, expected=str(sizes), found=str(list(array.shape)),
            )  # fmt: skip


def _without_bfloat16(node: onnx.NodeProto) -> onnx.NodeProto:
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.BFLOAT16:
            attribute.i = onnx.TensorProto.FLOAT
        if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.BFLOAT16:
            array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
    return node


def _not_runnable(value: ir.Value, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        "cannot run the context, so causality cannot be checked",
        code=Code.CONTEXT_NOT_RUNNABLE, at=value.name, found=" ".join(str(error).split())[:200],
    )  # fmt: skip
