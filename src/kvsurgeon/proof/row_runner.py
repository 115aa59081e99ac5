"""Row runner: compute some rows of context and attention weights at any length, without the rows between them.

The rows of a mask of 100,000 tokens are computed as a decode step computes them: context slices are pushed up to where
the context comes from. Queries, keys and total length are independent of each other, so a row can be computed with
later tokens behind it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import sympy
from onnxruntime import InferenceSession

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import MaskPattern, unmasked
from kvsurgeon.analysis.probe_feeds import ProbeFeeds
from kvsurgeon.analysis.probe_inputs import EXTENT, Rows
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner, not_runnable, without_bfloat16
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.execution import build_model, initializer, open_session
from kvsurgeon.graph.query import upstream
from kvsurgeon.resizing.context_slices import ContextSlices
from kvsurgeon.resizing.lengths import INT64, LengthValues
from kvsurgeon.resizing.token_data import TokenRewriter
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, MAX, NEW, PAST, Dimension, Extent
from kvsurgeon.symbolic.sequence_axes import Axes

_NUMBERS = {PAST: "rows_start", NEW: "rows_count", MAX: "rows_total", BATCH: "rows_batch"}


class RowRunner:
    """Computes rows of the values that a subgraph runner computes.

    Args:
        analysis: The analysis of the decoder.
        whole: Runner of the same values at all rows.
        axes: The sequence axes of each value.
        site: The attention whose scores are probed, if there is one.

    Raises:
        UnsupportedError: The values cannot be computed row by row.
    """

    def __init__(
        self, analysis: Analysis, whole: SubgraphRunner, axes: Sequence[Axes], site: AttentionSite | None = None
    ) -> None:
        self.outputs = whole.outputs
        site = None if site is None or site.fused is not None else site
        flow, numbers = analysis.flow, {symbol: _scalar(name) for symbol, name in _NUMBERS.items()}
        graph = ir.Graph([*numbers.values()], [], nodes=[], opset_imports=dict(flow.opsets))
        editor = Editor(ir.Model(graph, ir_version=10))
        sources = {symbol: (value, None) for symbol, value in numbers.items()}
        sources |= {extent: (editor.constant(EXTENT, name=str(extent)), None) for extent in _extents(analysis.inputs)}
        lengths = LengthValues(editor, sources, total=MAX)
        slices = ContextSlices(flow, editor, lengths, analysis.inputs, analysis.same)
        tokens = TokenRewriter(slices, {node: tuple(node.inputs) for node in whole.nodes})
        self.inputs = ProbeFeeds(flow, () if site is None else site.weight_sources, () if site is None else site.ends)
        totals: list[ir.Value] = []
        copies: set[ir.Node] = set()  # of nodes of token data
        try:
            for value in () if site is None else site.other_keys:
                total = ir.Value(name=f"{value.name}.all", type=value.type)
                self.inputs.add_total(value, total.name or "")
                tokens.add_total(value, total)
                totals.append(total)
            for node in whole.nodes:
                if any(is_token(flow, value) for value in node.outputs):
                    copies.add(tokens.copy(node))
            made = [
                tokens.copied(value) if is_token(flow, value) else slices.slice_of(value, wanted)
                for value, wanted in zip(self.outputs, axes, strict=True)
            ]
            self._session = self._open(made, graph, totals, copies, flow.opsets)
            self._shapes = [
                (shape if axes else _whole(shape), axes)
                for value, axes in slices.made()
                if axes or flow.kinds.get(value, ValueKind.CONSTANT) is not ValueKind.CONSTANT  # a whole table is fed
                for shape in [flow.shapes[value].shape or ()]
            ]
            self._shapes += [(flow.shapes[value].shape or (), flow.axes.get(value, ())) for value in self.inputs.probed]
        except UnsupportedError:
            raise
        except Exception as error:
            raise not_runnable(self.outputs[0], error) from error
        finally:
            for node in graph:  # detach the copies from the values of the model
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)

    def _open(
        self, outputs: Sequence[ir.Value], graph: ir.Graph, totals: Iterable[ir.Value], copies: Collection[ir.Node],
        opsets: Mapping[str, int],
    ) -> InferenceSession:  # fmt: skip
        """Open a session that computes the outputs; the totals are fed."""
        names = {value: f"rows.constant.{place}" for place, value in enumerate(graph.initializers.values())}
        nodes: list[ir.Node] = []
        stopped = {*graph.inputs, *graph.initializers.values(), *totals}

        def stop(value: ir.Value) -> bool:
            return value in stopped

        for value in upstream(outputs, stop=stop, inputs=lambda node: node.inputs):
            if value in stopped:
                continue
            producer = value.producer()
            if (producer is None or producer.graph is not graph) and self.inputs.add(value):
                stopped.add(value)
            elif producer is not None and value in names:
                continue  # another output of the node led here
            elif producer is not None:
                nodes.append(producer)
                names |= {output: f"rows.{len(names) + place}" for place, output in enumerate(producer.outputs)}
            else:
                raise UnsupportedError(
                    "the subgraph reads a value of an outer graph", code=Code.CONTROL_FLOW, at=value.name
                )
        types = {name: (INT64, 0) for name in _NUMBERS.values()} | self.inputs.types
        constants = [
            initializer(names[value], tensor)
            for value in graph.initializers.values()
            if (tensor := value.const_value) is not None
        ]
        model = build_model(
            [proto for node in _in_order(nodes) for proto in _renamed(node, names, rounded=node not in copies)],
            inputs=types, opsets=opsets,
            outputs=[names.get(value, value.name) for value in outputs],
            initializers=[*self.inputs.initializers, *constants],
        )  # fmt: skip
        return open_session(model)

    def elements(self, rows: Rows) -> int:
        """Return the number of elements of the largest value that a run computes, or about that."""
        return max((math.prod(rows.sizes(shape, axes)) for shape, axes in self._shapes), default=1)

    def run(self, rows: Rows, mask: MaskPattern = unmasked, **options: Any) -> list[np.ndarray]:
        """Return the outputs for a batch of two sequences.

        Args:
            rows: The tokens.
            mask: The tokens that the mask inputs mask.
            options: See `ProbeFeeds.arrays`.

        Raises:
            UnsupportedError: They cannot be computed.
        """
        numbers = (rows.start, rows.stop - rows.start, rows.total, rows.batch)
        try:
            feeds = self.inputs.arrays(rows, mask, **options)
            feeds |= {name: np.array(number) for name, number in zip(_NUMBERS.values(), numbers, strict=True)}
            needed = {given.name for given in self._session.get_inputs()}
            feeds = {name: array for name, array in feeds.items() if name in needed}
            return [np.asarray(array) for array in self._session.run(None, feeds)]
        except Exception as error:
            raise not_runnable(self.outputs[0], error) from error


def _extents(inputs: Iterable[InputRole]) -> list[sympy.Symbol]:
    """Return the sizes of input axes that are neither the batch nor the tokens."""
    sizes = [size for given in inputs for size in given.dimensions if isinstance(size, sympy.Basic)]
    return sorted({extent for size in sizes for extent in size.atoms(Extent)}, key=str)


def _whole(shape: Sequence[Dimension]) -> Sequence[Dimension]:
    """Return the shape of a value that is computed for all tokens: if a size is not known, that of a mask."""
    return shape if dim.all_known(shape) else (BATCH, LENGTH, LENGTH)


def _scalar(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(INT64), shape=ir.Shape([]))


def _renamed(node: ir.Node, names: dict[ir.Value, str], *, rounded: bool) -> list[onnx.NodeProto]:
    """Return a node with unique names of values, although it comes from one of two graphs; see `without_bfloat16`."""
    proto = ir.serde.serialize_node(node)
    proto.input[:] = ["" if value is None else names.get(value, value.name or "") for value in node.inputs]
    proto.output[:] = [names[value] for value in node.outputs]
    return without_bfloat16(proto, [value.dtype for value in node.outputs] if rounded else ())


def _in_order(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return nodes in execution order, each once."""
    ordered: dict[ir.Node, None] = {}
    wanted = set(nodes)
    pending = list(wanted)
    while pending:
        node = pending[-1]
        before = [source for value in node.inputs if value is not None and (source := value.producer()) in wanted]
        waiting = [source for source in before if source is not None and source not in ordered]
        if waiting:
            pending += waiting
        else:
            ordered[pending.pop()] = None
    return list(ordered)
