"""Conditions of a query and a key: numbers of both tokens, compared with constants or looked up in a table.

Which tokens make them true is not known, so attention must be causal whichever of them are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.probe_inputs import Rows, run_dtype
from kvsurgeon.analysis.token_data import token_inputs
from kvsurgeon.errors import Code
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.proof.attention.attention_probe import AttentionProbe
from kvsurgeon.proof.content_masks import MAX_CONDITIONS, constant_content
from kvsurgeon.symbolic.sequence_axes import Length


def check_conditions(probe: AttentionProbe, length: int) -> None:
    """Check that attention is causal and prefix stable whichever conditions of queries and keys are true.

    Raises:
        UnsupportedError: It is not, or there are too many conditions.
    """
    conditions = dict(_conditions(probe)) if probe.runner.probed else {}
    if not conditions:
        return
    if len(conditions) > MAX_CONDITIONS:
        reason = "the mask is computed from many conditions of a query and a key"
        raise probe.unsupported(reason, Code.TOKEN_DEPENDENT_MASK, hint="export with the mask as an input")
    runner = probe.sweep.runner(probe.runner.outputs, probe.site, given=conditions)
    texts = {count: Rows.of_text(count) for count in probe.sweep.with_half(length)}
    for numbers in itertools.product(*conditions.values()):
        for value, number in zip(conditions, numbers, strict=True):
            runner.inputs.give(value.name or "", partial(_filled, probe, value, number))
        probe.check_lengths({count: probe.compared(runner.run(count), rows) for count, rows in texts.items()})


def _conditions(probe: AttentionProbe) -> Iterator[tuple[ir.Value, tuple[float, float]]]:
    """Yield the results of nodes that compare or look up what is computed from a query and a key.

    Each comes with the two numbers that it may hold, or the least and the largest of the table.
    """
    flow, site = probe.sweep.flow, probe.site
    comparisons = {score.node for score in site.scores if score.compares}
    for node in sorted(site.upstream_of_weights - comparisons, key=flow.order.__getitem__):
        inputs = token_inputs(flow, node)
        axes = flow.axes.get(inputs[0], ()) if len(inputs) == 1 else ()
        if {axis.variable.resolved() for axis in axes} != {Length.NEW, Length.TOTAL}:
            continue
        if has_trait(node, Trait.ORDER) or node.op_type == "Equal":
            yield node.outputs[0], (0.0, 1.0)
        elif has_trait(node, Trait.LOOKUP):
            table = constant_content(node, node.inputs[0])
            if table is not None and table.size:
                yield node.outputs[0], (float(table.min()), float(table.max()))


def _filled(probe: AttentionProbe, value: ir.Value, number: float, rows: Rows) -> np.ndarray:
    fact, axes = probe.sweep.flow.shapes[value], probe.sweep.flow.axes[value]
    return np.full(rows.sizes(fact.shape or (), axes), number, run_dtype(fact.dtype or ir.DataType.BOOL).numpy())
