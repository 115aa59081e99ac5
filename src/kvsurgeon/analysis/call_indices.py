"""Numbers that address places within one call: they must be as long as the call, not as all tokens so far.

Such context is left as the export computes it. Where it is made of nothing but shapes of the stream, it has the length
of the new tokens when the model runs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import all_seen
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.symbolic.sequence_axes import Length

LENGTHS = (3, 8)  # tokens at which addresses are looked at


def is_of_new_tokens(flow: TokenFlow, value: ir.Value) -> bool:
    """Whether a value, as the export computes it, follows the new tokens: nothing given for all tokens is read."""
    if isinstance(flow.length, int):
        return False
    given = {given.value: given for given in flow.inputs}
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        if current in seen or constant_tensor(current) is not None:
            continue
        seen.add(current)
        if current in given and not given[current].is_token:
            return False
        if current in flow.axes:
            if any(axis.role.resolved() is not Length.NEW for axis in flow.axes[current]):
                return False
            continue
        node = current.producer()
        pending += [] if node is None else [source for source in node.inputs if source is not None]
    return True


def is_grid(flow: TokenFlow, indices: ir.Value, whole: set[int]) -> bool:
    """Whether indices [d0, d1, ..., n] address a block: number c depends on the place along axis c alone.

    Args:
        flow: What was learnt about token data.
        indices: Context; it is run.
        whole: Axes along which every place must be addressed, in order.
    """
    try:
        experiment = SubgraphRunner(flow=flow, inputs=flow.inputs, opsets=flow.opsets, outputs=[indices])
        arrays = [experiment.run(length, all_seen)[0] for length in LENGTHS]
    except UnsupportedError:
        return False
    columns = [_columns(array) for array in arrays]
    if any(found is None for found in columns):
        return False
    first, second = ([] if found is None else found for found in columns)
    for axis, (one, other) in enumerate(zip(first, second, strict=True)):
        in_order = all(np.array_equal(column, np.arange(len(column))) for column in (one, other))
        if not (in_order if axis in whole else np.array_equal(one, other)):
            return False
    return True


def _columns(indices: np.ndarray) -> list[np.ndarray] | None:
    """Of each number in the last axis how it goes along its own axis; None where it depends on others."""
    if indices.ndim - 1 != indices.shape[-1]:
        return None
    found = []
    for axis in range(indices.shape[-1]):
        along = np.moveaxis(indices[..., axis], axis, -1)
        line = along.reshape(-1, along.shape[-1])[0]
        if not (along == line).all():
            return None
        found.append(line)
    return found
