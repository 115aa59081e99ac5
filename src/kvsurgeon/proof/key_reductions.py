"""Reductions of attention scores over keys: a query must not see a later key in any of them.

A maximum of scores before they are masked depends on later keys, whatever is computed from it: axes decide that. If the
length is fixed, a reduction of masked scores may depend on the number of later keys, so it is run without them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import is_close
from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.execution import build_model, initializer, open_session
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import find_links, has_trait
from kvsurgeon.proof.length_sweep import LengthSweep
from kvsurgeon.symbolic.sequence_axes import Axes


def check_key_reductions(sweep: LengthSweep, layer: int, site: AttentionSite) -> None:
    """Check that every reduction of scores over keys is of masked scores.

    Raises:
        UnsupportedError: A reduction reads scores of later keys, or counts them.
    """
    longest = max(sweep.attention_lengths(site))
    for node, index in _reductions(sweep.flow, site):
        found = None
        if not _is_masked(sweep.flow, site, node):
            if has_trait(node, Trait.SOFTMAX):
                continue  # its sum may cancel later; it is run with much larger scores of later keys
            found = "scores before any mask"
        elif has_trait(node, Trait.LOOKUP) and longest < max(sweep.lengths):
            found = f"keys selected by position, which was checked up to {longest} tokens only"
        elif sweep.fixed is not None and _counts_later_keys(sweep, site, node, index, sweep.fixed):
            found = "a result that changes with the number of later keys"
        if found is not None:
            raise UnsupportedError(
                f"attention is not causal: {node.op_type} reads the scores of later keys", code=Code.NOT_CAUSAL,
                layer=layer, at=node.outputs[0].name, expected="masked scores", found=found,
            )  # fmt: skip


def normalizes_before_mask(flow: TokenFlow, site: AttentionSite) -> bool:
    """Return whether scores are normalized over all keys before they are masked, which is right if done again after."""
    nodes = site.upstream_of_weights
    return any(node in nodes and not _is_masked(flow, site, node) for node, _ in _reductions(flow, site))


def _reductions(flow: TokenFlow, site: AttentionSite) -> Iterator[tuple[ir.Node, int]]:
    """Yield the nodes in which elements along the axis of the keys influence earlier ones, and the input they read."""
    for node, variable in flow.mixes_keys.items():
        if not site.products or variable.root() is not site.products[0].variable.root():
            continue
        links = find_links(flow.shapes.call(node))
        if links is None:
            continue
        for index, (value, labels) in enumerate(zip(node.inputs, links.inputs, strict=False)):
            for axis in flow.axes.get(value, ()) if value is not None and labels is not None else ():
                label = labels[axis.axis] if labels is not None else None
                is_key = axis.variable.root() is variable.root() and label not in links.padded
                mixed = label in links.mixed or label in (links.summed or ())
                if is_key and mixed and label is not None and links.windows.get(label, (0, 1))[1] > 0:
                    yield node, index


def _is_masked(flow: TokenFlow, site: AttentionSite, node: ir.Node) -> bool:
    """Return whether context that has an axis of queries and one of keys is combined with what a node reads."""
    above = site.upstream_of(node.inputs)
    pairs = {place[0] for place, axes in flow.demands.items() if len(axes) > 1}
    return any(one in pairs or one in flow.diagonals for one in above)


def _counts_later_keys(sweep: LengthSweep, site: AttentionSite, node: ir.Node, index: int, length: int) -> bool:
    """Return whether the result for some tokens changes if later tokens are cut off what a node reads."""
    flow, value, result = sweep.flow, node.inputs[index], node.outputs[0]
    assert value is not None
    (array,) = sweep.runner([value], site).run(length)
    others = {one: constant_tensor(one) for one in node.inputs if one is not None and one is not value}
    if any(tensor is None for tensor in others.values()):
        return True
    session = open_session(
        build_model(
            [node], inputs={value.name or "": (ir.DataType.from_numpy(array.dtype), array.ndim)},
            outputs=[result.name], opsets=flow.opsets,
            initializers=[initializer(one.name, tensor) for one, tensor in others.items() if tensor is not None],
        )
    )  # fmt: skip

    def run(operand: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {value.name: operand})[0])

    whole = run(array)
    return not all(
        is_close(_first(whole, flow.axes[result], count, length), run(_first(array, flow.axes[value], count, length)))
        for count in {1, 2, length // 2, length - 1}
        if 0 < count < length
    )


def _first(array: np.ndarray, axes: Axes, count: int, length: int) -> np.ndarray:
    """Return the array with the first tokens along each sequence axis, and its learned rows."""
    for axis in axes:
        inner = int(at_length(axis.inner, length))
        row = np.arange(array.shape[axis.axis]) // inner % (length + axis.learned_rows) - axis.rows_before
        array = array.compress((row < count) | (row >= length), axis=axis.axis)
    return array
