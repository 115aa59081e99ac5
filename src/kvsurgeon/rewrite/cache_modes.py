"""Cache modes in the graph: how the new rows enter the cache, and which rows attention reads.

dynamic       present = Concat(past, new rows); attention reads the present
static        present = past with the rows [P, P + S) replaced, where P may differ by sequence; attention reads the
              present, or a copy of its first T rows. Rows that no token filled are future tokens, which causality
              hides from every query.
new-tokens    present = new rows; attention reads Concat(past, new rows)

In every mode, a state of which the last rows are enough has as many rows: present = the last rows of Concat(past, new).
Of a layer with a window, present = the rows that the window keeps of Concat(past, new).
"""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import padding_mask
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import NodeBuilder
from kvsurgeon.resizing.context_slices import ContextSlices
from kvsurgeon.resizing.lengths import INT64, LengthValues
from kvsurgeon.resizing.windows import Window, first_tokens, kept_rows
from kvsurgeon.rewrite.by_sequence.token_rows import first_rows, rows_of_buffer
from kvsurgeon.rewrite.cache_plan import CachePlan
from kvsurgeon.rewrite.cache_tensors import CacheTensor
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import NEW, PAST, TOTAL

TENSOR_SCATTER = 24  # first opset with TensorScatter


def update_cache(
    plan: CachePlan, slices: ContextSlices, tensor: CacheTensor, past: ir.Value, rows: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return the cache output, and the rows that attention reads.

    Args:
        plan: The cache mode.
        slices: Context for the rows that attention reads.
        tensor: The cached tensor.
        past: The cache input.
        rows: The new rows, in the layout and type of the cache.
    """
    lengths = slices.lengths
    if tensor.window is not None and tensor.window.first:
        return _first_and_last_rows(slices, tensor, tensor.window, past, rows)
    if tensor.kept is not None:
        return _last_rows(lengths, tensor, past, rows)
    if plan.cache_mode == "static":
        present = _scattered(plan, lengths, tensor, past, rows)
        return present, read_cache(plan, lengths, tensor, present)
    is_dynamic = plan.cache_mode == "dynamic"
    all_rows = lengths.editor.node(
        "Concat", [past, rows], {"axis": tensor.axis}, name=tensor.present if is_dynamic else f"{tensor.present}.all",
        dtype=tensor.dtype, shape=tensor.shape(plan.total),
    )  # fmt: skip
    if is_dynamic:
        return all_rows, all_rows
    present = lengths.editor.node(
        "Identity", [rows], name=tensor.present, dtype=tensor.dtype, shape=tensor.shape(plan.present)
    )
    return present, all_rows


def _last_rows(lengths: LengthValues, tensor: CacheTensor, past: ir.Value, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the last rows of past and new ones, and all of these."""
    editor, count = lengths.editor, tensor.state_rows if tensor.window is None else tensor.window.last
    assert count is not None
    all_rows = editor.node(
        "Concat", [past, rows], {"axis": tensor.axis}, name=f"{tensor.present}.all", dtype=tensor.dtype
    )
    bounds = [editor.constant([number], name="last_rows") for number in (-count, int(INT64.max), tensor.axis)]
    present = editor.node(
        "Slice", [all_rows, *bounds], name=tensor.present, dtype=tensor.dtype, shape=tensor.shape(count)
    )
    return present, all_rows


def _first_and_last_rows(
    slices: ContextSlices, tensor: CacheTensor, window: Window, past: ir.Value, rows: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return the rows of the first tokens and the last rows of past and new ones, and all of these."""
    lengths, editor = slices.lengths, slices.editor
    all_rows = editor.node(
        "Concat", [past, rows], {"axis": tensor.axis}, name=f"{tensor.present}.all", dtype=tensor.dtype
    )
    dropped = lengths.flat(dim.at_least_zero(dim.subtract(lengths.total, window.most)))
    op, first, mask = NodeBuilder(editor, f"{tensor.present}.kept"), None, padding_mask(slices.flow.inputs)
    if mask is not None:
        indices = lengths.once(
            ("first tokens", window),
            lambda: first_tokens(op, window, slices.slice_of(mask), dropped, lengths.flat(lengths.total)),
        )
        first = _indices_of_rows(op, tensor, indices)
    kept = kept_rows(op, window, all_rows, tensor.axis, dropped, first)
    present = editor.node(
        "Concat", kept, {"axis": tensor.axis}, name=tensor.present, dtype=tensor.dtype, shape=tensor.shape(0)
    )
    return present, all_rows


def _indices_of_rows(op: NodeBuilder, tensor: CacheTensor, indices: ir.Value) -> ir.Value:
    """Return indices [batch, rows] for each head and feature of a cached tensor."""
    if tensor.axis < tensor.layout.index("batch"):
        indices = op.Transpose(indices, perm=[1, 0])
    others = [place for place, axis in enumerate(tensor.layout) if axis not in ("batch", "sequence")]
    sizes = {"kv_heads": tensor.point.heads, "head_dim": tensor.width}
    target = op.int64([sizes.get(axis, 1) for axis in tensor.layout])
    return op.Expand(op.with_axes("Unsqueeze", indices, others), target)


def read_cache(plan: CachePlan, lengths: LengthValues, tensor: CacheTensor, present: ir.Value) -> ir.Value:
    """Return the rows that attention reads of an updated cache.

    Raises:
        UnsupportedError: A fused operator updates the cache, and only new rows are wanted.
    """
    if plan.cache_mode == "new-tokens":
        raise UnsupportedError(
            "no attention operator with a cache returns new rows only", code=Code.FUSED_OPERATOR, at=tensor.present,
            expected="a dynamic or static cache",
        )  # fmt: skip
    present.shape = ir.Shape(tensor.shape(plan.present))
    if plan.total == plan.present:
        return present
    bounds = [lengths.vector([0]), lengths.vector([TOTAL]), lengths.editor.constant([tensor.axis], name="axes")]
    return lengths.editor.node(
        "Slice", [present, *bounds], name=f"{tensor.present}.so_far", dtype=tensor.dtype, shape=tensor.shape(TOTAL)
    )


def _scattered(plan: CachePlan, lengths: LengthValues, tensor: CacheTensor, past: ir.Value, rows: ir.Value) -> ir.Value:
    editor, sizes, places = lengths.editor, tensor.sizes(NEW), plan.token_rows
    if editor.opset >= TENSOR_SCATTER and tensor.layout[0] == "batch":  # the axis of which it reads an index for each
        start = lengths.repeated(PAST, sizes[0]) if places is None else first_rows(lengths, places)
        operator, inputs, axis = "TensorScatter", [past, rows, start], tensor.axis - len(sizes)
    else:
        indices = (
            lengths.indices(PAST, sizes, tensor.axis)
            if places is None
            else rows_of_buffer(lengths, tensor.layout, sizes, places)
        )
        operator, inputs, axis = "ScatterElements", [past, indices, rows], tensor.axis
    present = ir.Value(name=editor.unique_name(tensor.present), type=ir.TensorType(tensor.dtype))
    message = editor.unique_name(f"{tensor.present}/tokens_exceed_the_rows_of_the_static_cache")  # of onnxruntime
    editor.operator("", operator, inputs, {"axis": axis}, [present], name=message)
    return present
