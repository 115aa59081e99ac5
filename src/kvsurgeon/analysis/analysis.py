"""The analysis of a decoder: input roles, shapes, token flow, attention sites and sequence states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.attention.cross_attention import CrossAttentionSite, find_cross_attentions
from kvsurgeon.analysis.attention.mask_forms import with_mask_forms
from kvsurgeon.analysis.attention_sites import AttentionSite, find_attention_sites
from kvsurgeon.analysis.cache_points import CachePoint, choose_cache_point
from kvsurgeon.analysis.common_subexpressions import find_common_subexpressions
from kvsurgeon.analysis.propagation import propagate_tokens
from kvsurgeon.analysis.regions.state_windows import StateWindow, find_windows
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.dataflow.input_roles import InputRole, classify_inputs
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.dataflow.value_kinds import classify_values
from kvsurgeon.graph.query import find_live
from kvsurgeon.symbolic.dimension import Dimension


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The result of the analysis of a decoder, with references into its graph.

    Attributes:
        model: The model, in standard operators.
        inputs: The role of each graph input.
        length: The one length that the export knows: a symbol, or a number if it is fixed.
        shapes: Shape, type and known numbers of each value.
        flow: Sequence axes of token data, and context that meets it.
        same: For each context value that is computed again, its first computation.
        sites: Attention sites in execution order.
        cross_attentions: Attention to keys that are the same in every call, in execution order.
        states: Tensors that are cached outside attention, in execution order.
        windows: Those of which the last rows are enough.
    """

    model: ir.Model
    inputs: Sequence[InputRole]
    length: Dimension
    shapes: Shapes
    flow: TokenFlow
    same: dict[ir.Value, ir.Value]
    sites: tuple[AttentionSite, ...]
    cross_attentions: tuple[CrossAttentionSite, ...]
    states: tuple[CachePoint, ...]
    windows: tuple[StateWindow, ...]

    @property
    def cached_states(self) -> tuple[CachePoint, ...]:
        """Cache points besides keys and values, each once: states, and what else attention reads of all tokens."""
        tensors = [one for site in self.sites for one in site.cached_tensors]
        pairs = {point.value for kind, point in tensors if kind != "state"}
        points = [*self.states, *(point for kind, point in tensors if kind == "state")]
        return tuple({point.value: point for point in points if point.value not in pairs}.values())

    def rows_of(self, value: ir.Value) -> int | None:
        """Return the number of last rows of a cached tensor that are enough; None if all are needed."""
        points = ((window, point) for window in self.windows for point in window.points)
        return next((window.rows for window, point in points if point.value is value), None)


def analyze(model: ir.Model) -> Analysis:
    """Return the analysis of a decoder without a cache, in standard operators; the model is not changed.

    Raises:
        UnsupportedError: It is not a causal decoder that can be handled soundly.
    """
    graph = model.graph
    live = find_live(graph)
    nodes: Sequence[ir.Node] = [node for node in graph if node in live]
    given = read_inputs(graph)
    shapes, length = given.shapes, given.length
    inputs = classify_inputs(given.dimensions, length)
    kinds = classify_values(nodes, inputs, shapes)
    flow = propagate_tokens(nodes, inputs, shapes, kinds, length, graph.opset_imports)
    sites = find_attention_sites(flow, at=graph.outputs[0].name if graph.outputs else None)
    flow.inputs = with_mask_forms(flow, sites)
    cached = [choose_cache_point(flow, place) for state in flow.cached_states for place in state.places]
    return Analysis(
        model=model, inputs=flow.inputs, length=length, shapes=shapes, flow=flow,
        same=find_common_subexpressions(nodes, kinds, shapes),
        sites=sites, cross_attentions=find_cross_attentions(flow),
        states=tuple({point.value: point for point in cached}.values()),
        windows=find_windows(flow, {point.value for site in sites for _, point in site.cached_tensors}),
    )  # fmt: skip
