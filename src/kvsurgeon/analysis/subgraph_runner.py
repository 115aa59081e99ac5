"""Subgraph runner: execute the nodes between some values in onnxruntime as they are, without reading weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import MaskPattern, unmasked
from kvsurgeon.analysis.probe_feeds import Feed, ProbeFeeds
from kvsurgeon.analysis.probe_inputs import Rows, at_length
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.errors import Code, UnsupportedError, reraise_mistake
from kvsurgeon.graph.execution import build_model, open_session, use_float32
from kvsurgeon.graph.query import all_inputs, is_operator, upstream
from kvsurgeon.symbolic.dimension import BATCH

MAX_ELEMENTS = 1 << 29  # of a tensor that is computed
_SCALE = 2**-4  # of quantized synthetic values


class SubgraphRunner:
    """Computes some values of a graph on probe inputs.

    Args:
        flow: The token flow of the graph.
        outputs: The values to compute.
        probed: Token values that are fed with synthetic values instead of being computed.
        stops: Nodes below which nothing is computed from `probed`.
        assumptions: Receives the statements that the results rest on, each with the name of the value it is about.
        given: Values whose arrays `inputs.give` sets before a run.
        fixed_ranges: Whether token data is quantized in one range in all runs, as it is assumed to be in all calls.

    Attributes:
        inputs: The inputs of the subgraph.
        nodes: The nodes that are executed, in order.

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
        given: Collection[ir.Value] = (),
        fixed_ranges: bool = False,
    ) -> None:
        self.flow = flow
        self.outputs = outputs
        self._fixed_ranges = fixed_ranges
        self.inputs = ProbeFeeds(flow, probed, stops, assumptions, given)
        self._fed: set[ir.Value] = set()
        try:
            self.nodes = self._find_nodes()
            self._check_sizes()
            model = build_model(
                [proto for node in self.nodes for proto in self._run_nodes(node)], inputs=self.inputs.types,
                outputs=[value.name for value in outputs], opsets=flow.opsets, initializers=self.inputs.initializers,
            )  # fmt: skip
            self._session = open_session(model)
        except UnsupportedError:
            raise
        except Exception as error:
            raise not_runnable(outputs[0], error) from error

    @property
    def probed(self) -> frozenset[ir.Value]:
        """The token values that are fed."""
        return self.inputs.probed

    @property
    def masks(self) -> list[InputRole]:
        """The graph inputs that mask tokens."""
        return self.inputs.masks

    @property
    def reads_numbers(self) -> bool:
        """Whether an input without tokens is read, whose numbers are up to the application."""
        return any(not given.lengths for given in self.masks)

    @property
    def feeds(self) -> dict[str, Feed]:
        """For each other input of the subgraph, by name: its array for rows of a text."""
        return self.inputs.feeds

    @property
    def maskable_sequences(self) -> tuple[int, ...]:
        """Indices of the two sequences if an input can mask tokens of one of them alone."""
        return (0, 1) if any(BATCH in given.dimensions and given.lengths for given in self.masks) else ()

    def _find_nodes(self) -> list[ir.Node]:
        """Return the nodes to execute, in order, after adding a feed for each value that is not computed."""
        nodes: list[ir.Node] = []
        for value in upstream(self.outputs, stop=lambda value: value in self._fed, inputs=lambda node: node.inputs):
            if self.inputs.add(value):
                self._fed.add(value)
            elif (node := value.producer()) is not None:
                if any(read not in node.inputs for read in all_inputs(node)):  # captured: not traced, not fed
                    raise UnsupportedError("the context contains control flow", code=Code.CONTROL_FLOW, at=value.name)
                nodes.append(node)
            else:
                raise UnsupportedError(
                    "the subgraph reads a value of an outer graph", code=Code.CONTROL_FLOW, at=value.name
                )
        return sorted(dict.fromkeys(nodes), key=lambda node: self.flow.order[node])

    def _run_nodes(self, node: ir.Node) -> list[onnx.NodeProto]:
        is_context = not any(is_token(self.flow, value) for value in node.outputs)
        if self._fixed_ranges and not is_context and is_operator(node, "DynamicQuantizeLinear"):
            return _quantized_in_one_range(ir.serde.serialize_node(node))
        dtypes = [self.flow.shapes[value].dtype for value in node.outputs]
        return without_bfloat16(ir.serde.serialize_node(node), dtypes if is_context else ())

    def _check_sizes(self) -> None:
        """Check that no tensor is too large to compute whatever the length, as one of a constant size may be."""
        for value in (value for node in self.nodes for value in node.outputs):
            elements = math.prod(Rows.of_text(2).sizes(self.flow.shapes[value].shape or ()))
            if elements > MAX_ELEMENTS:
                raise UnsupportedError(
                    "context contains a tensor that is too large to compute", code=Code.CONTEXT_NOT_RUNNABLE,
                    at=value.name, expected=f"at most {MAX_ELEMENTS} elements", found=str(elements),
                )  # fmt: skip

    def run(self, length: int, mask: MaskPattern = unmasked, *, batch: int = 2, **options: Any) -> list[np.ndarray]:
        """Return the outputs for a batch of sequences.

        Args:
            length: Number of tokens of each sequence.
            mask: The tokens that the mask inputs mask.
            batch: Number of sequences.
            options: See `ProbeFeeds.arrays`.

        Raises:
            UnsupportedError: The subgraph does not run, or a shape is not the inferred one.
        """
        rows = Rows(0, length, length, batch)
        try:
            feeds = self.inputs.arrays(rows, mask, **options)
            arrays = [np.asarray(array) for array in self._session.run(None, feeds)]
        except Exception as error:
            raise not_runnable(self.outputs[0], error) from error
        for value, array in zip(self.outputs, arrays, strict=True):
            self._check_shape(value, array, rows)
        return arrays

    def _check_shape(self, value: ir.Value, array: np.ndarray, rows: Rows) -> None:
        sizes = [at_length(size, rows.total, rows.batch) for size in self.flow.shapes[value].shape or ()]
        if isinstance(self.flow.length, int):  # a sequence axis has another size than in the export
            for axis in self.flow.axes.get(value, ()):
                sizes[axis.axis] = rows.total if axis.is_plain else sizes[axis.axis]
        if len(sizes) != array.ndim or any(
            isinstance(size, int) and size != actual for size, actual in zip(sizes, array.shape, strict=True)
        ):
            raise UnsupportedError(
                "a tensor does not have the inferred shape when it is computed", code=Code.INCONSISTENT_SHAPES,
                at=value.name, expected=str(sizes), found=str(list(array.shape)),
            )  # fmt: skip


def _quantized_in_one_range(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return nodes that quantize synthetic values in place of a `DynamicQuantizeLinear`, which measures their range."""
    number, scale, zero_point = node.output
    middle = onnx.helper.make_tensor(zero_point, onnx.TensorProto.UINT8, [], [128])
    return [
        onnx.helper.make_node("Constant", [], [scale], value_float=_SCALE),
        onnx.helper.make_node("Constant", [], [zero_point], value=middle),
        onnx.helper.make_node("QuantizeLinear", [node.input[0], scale, zero_point], [number]),
    ]


def without_bfloat16(node: onnx.NodeProto, rounded: Sequence[ir.DataType | None] = ()) -> list[onnx.NodeProto]:
    """Return nodes that compute float32 in place of bfloat16.

    Args:
        node: A node.
        rounded: The types of its outputs if those of bfloat16 are to be rounded to it: positions that are equal in
            bfloat16 must be equal in a run. Attention weights are not rounded, so that rounding hides no difference.
    """
    use_float32(node, [onnx.TensorProto.BFLOAT16])
    nodes = [node]
    for place, (name, dtype) in enumerate(zip(node.output, rounded, strict=False)):
        if name and dtype is ir.DataType.BFLOAT16:
            exact, narrow = f"{name}.exact", f"{name}.bfloat16"
            node.output[place] = exact
            nodes.append(onnx.helper.make_node("Cast", [exact], [narrow], to=onnx.TensorProto.BFLOAT16))
            nodes.append(onnx.helper.make_node("Cast", [narrow], [name], to=onnx.TensorProto.FLOAT))
    return nodes


def not_runnable(value: ir.Value, error: Exception) -> UnsupportedError:
    """Return an error: onnxruntime cannot run a subgraph."""
    reraise_mistake(error)
    return UnsupportedError(
        "cannot run the context, so causality cannot be checked",
        code=Code.CONTEXT_NOT_RUNNABLE, at=value.name, found=" ".join(str(error).split())[:200],
    )  # fmt: skip
