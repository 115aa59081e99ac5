"""Value numbering of attention sites: sites with one number compute weights in the same way, so one of them is run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.query import downstream
from kvsurgeon.graph.value_numbering import ValueNumbering, constant_key


def number_site(
    analysis: Analysis, site: AttentionSite, reductions: Sequence[ir.Value], keys: dict[Hashable, int]
) -> Hashable:
    """Return a key that is equal for sites that compute weights and reductions in the same way from the same context.

    Args:
        analysis: The analysis of the decoder.
        site: The attention.
        reductions: Other values reduced from its scores; see `other_reductions`.
        keys: Numbers by key, filled on the way; sites are compared if they share it.
    """
    if site.fused is not None:
        mask = None if site.fused.inputs.mask is None else site.fused.node.inputs[site.fused.inputs.mask]
        return site.fused.inputs.causal, None if mask is None else analysis.same.get(mask, mask)
    flow, shapes = analysis.flow, analysis.flow.shapes
    probed: dict[ir.Value, Hashable] = {}
    for index, score in enumerate(site.scores):
        value = score.node.outputs[0]
        learned = tuple((axis.rows_before, axis.rows_after) for axis in flow.axes[value])
        if not score.compares:
            probed[value] = ("score", index, shapes[value].shape, learned)
    for index, value in enumerate((*site.other_queries, *site.other_keys)):
        probed[value] = ("operand", index, shapes[value].shape)
    computed = set(downstream(site.weight_sources, stop=site.ends.__contains__))

    def leaf(value: ir.Value) -> Hashable | None:
        if value in probed:
            return probed[value]
        if flow.kinds.get(value) is ValueKind.CONTEXT:
            return analysis.same.get(value, value)
        if not is_token(flow, value):
            return constant_key(value) or value
        return None if value in computed else ("token data", shapes[value].shape)

    numbering = ValueNumbering(leaf, keys=keys)
    weights = [value for product in site.products for value in product.weights_read]
    return tuple(numbering[value] for value in (*weights, *reductions))
