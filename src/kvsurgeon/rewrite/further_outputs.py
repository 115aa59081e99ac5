"""Outputs that are values of the whole text: context, such as lengths, positions and masks, and cached tensors.

They are computed for all tokens so far. All other outputs are token data: like the logits, they have a row for each new
token, and a column for each key if they are scores or weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.resizing.context_slices import ContextSlices
from kvsurgeon.resizing.lengths import LengthValues
from kvsurgeon.rewrite.cache_layouts import is_canonical_view, reordered
from kvsurgeon.rewrite.cache_tensors import CacheTensor
from kvsurgeon.symbolic.dim_names import DimNames, dim_names
from kvsurgeon.symbolic.dimension import MAX, TOTAL


def return_context_so_far(analysis: Analysis, slices: ContextSlices) -> None:
    """Compute each output that is context for all tokens so far, whatever the rows of the cache.

    Raises:
        UnsupportedError: The export has a fixed length, and the value of fewer tokens is not known.
    """
    outputs = [value for value in analysis.model.graph.outputs if analysis.flow.kinds.get(value) is ValueKind.CONTEXT]
    if not outputs:
        return
    if not isinstance(analysis.length, int):
        slices = slices.so_far()
    for value in dict.fromkeys(outputs):
        if slices.fixed and not slices.given_axes(value):
            raise UnsupportedError(
                "an output that depends on the length has the fixed length of the export", code=Code.FIXED_LENGTH,
                at=value.name, hint="export with dynamic axes, or use cache=static",
            )  # fmt: skip
        whole, fact = slices.slice_of(value), slices.fact(value)
        if whole is value:
            continue
        output = slices.editor.replace_output(value, whole)
        if fact.shape is not None:
            output.shape = ir.Shape(dim_names(slices.sizes(fact.shape, ())))


def return_cached_tensors(
    outputs: Sequence[ir.Value], lengths: LengthValues, all_rows: Mapping[CacheTensor, ir.Value]
) -> dict[str, DimNames]:
    """Return past and new rows in each output that is a cached tensor, as [batch, heads, sequence, head_dim].

    Returns:
        Dimensions of those outputs whose length is that of the cache and not the number of tokens.
    """
    longer: dict[str, DimNames] = {}
    for value in dict.fromkeys(outputs):
        tensor = next((tensor for tensor in all_rows if is_canonical_view(value, tensor.point)), None)
        if tensor is None:
            continue
        rows = reordered(lengths, tensor.point, all_rows[tensor], tensor.order)
        output = lengths.editor.replace_output(value, rows)
        canonical = replace(tensor, layout=DEFAULT_LAYOUT, bits=None)
        output.shape = ir.Shape(canonical.shape(lengths.total))
        if lengths.total != TOTAL:
            longer[output.name or ""] = canonical.shape(MAX)
    return longer
