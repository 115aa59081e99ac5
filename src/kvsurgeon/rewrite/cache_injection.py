"""Cache injection: add the cache inputs and outputs, and rewrite the graph for the two lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.regions.attention_windows import windowed_nodes
from kvsurgeon.analysis.token_flow import SequenceState
from kvsurgeon.cache.pairs import LAST_ROWS
from kvsurgeon.cache.states import mark_recurrent_state
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.resizing.context_slices import ContextSlices
from kvsurgeon.resizing.lengths import LengthValues
from kvsurgeon.resizing.token_data import InputsBefore, TokenRewriter
from kvsurgeon.rewrite.by_sequence.token_rows import replace_token_rows
from kvsurgeon.rewrite.cache_layouts import add_cached_rows, is_canonical_view, to_cache
from kvsurgeon.rewrite.cache_metadata import cache_metadata, write_cache_metadata
from kvsurgeon.rewrite.cache_modes import read_cache, update_cache
from kvsurgeon.rewrite.cache_plan import CachePlan, add_past_length, find_sources
from kvsurgeon.rewrite.cache_tensors import CacheTensor, KeptRows, RecurrentTensor, with_scales
from kvsurgeon.rewrite.causal_masks import mask_causal_operators
from kvsurgeon.rewrite.declared_shapes import declare_shapes, outputs_of_cache_length
from kvsurgeon.rewrite.further_outputs import return_cached_tensors, return_context_so_far
from kvsurgeon.rewrite.head_grouping import HeadGrouping
from kvsurgeon.rewrite.quantized_rows import dequantize_rows, quantize_rows
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import BATCH
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable

CacheValues = Mapping[CacheTensor, ir.Value]

# Adds attention operators that update the cache, given the cache inputs. Returns the cache outputs that they compute,
# and a function that connects the operators once the context slices are in place.
AddOperators = Callable[[LengthValues, InputsBefore, CacheValues], tuple[CacheValues, Callable[[], None]]]


def inject_cache(analysis: Analysis, plan: CachePlan, add_operators: AddOperators) -> int:
    """Inject a cache into the analyzed graph, and return the number of edits.

    Args:
        analysis: Analysis of a model without a cache.
        plan: Plan of the cache.
        add_operators: Adds attention operators that update the cache; see `AddOperators`.

    Raises:
        UnsupportedError: The graph cannot be rewritten for two lengths; it is partly edited.
    """
    flow, editor = analysis.flow, Editor(analysis.model)
    before: InputsBefore = {node: tuple(node.inputs) for node in flow.order}
    pasts = _add_inputs(analysis, editor, plan)
    sources = find_sources(plan, analysis, editor, pasts)
    lengths = LengthValues(editor, sources, total=plan.total, limit=plan.limit)
    slices = ContextSlices(flow, editor, lengths, analysis.inputs, analysis.same)
    tokens = TokenRewriter(slices, before)
    grouping, windows = HeadGrouping(tokens), _window_rewriters(analysis, tokens, pasts)
    updated, connect_operators = add_operators(lengths, before, pasts)
    presents, all_rows = _update_caches(plan, tokens, grouping, pasts, updated, windows)
    computed = {node: windows[one.rows] for one in analysis.windows for state in one.states for node in state.nodes}
    windowed = {tensor.point.value: tensor.window for tensor in plan.tensors if tensor.window is not None}
    shorter: dict[ir.Node, TokenRewriter] = {}
    for site in analysis.sites:
        if site.keys[0].cache_point.value in windowed:
            rewriter = windows[windowed[site.keys[0].cache_point.value]]
            shorter |= dict.fromkeys(windowed_nodes(flow, site), rewriter)
    computed |= shorter
    recurrences = _rewriter_of_new(analysis, tokens)
    computed |= {node: recurrences for state, _ in flow.recurrences for node in state.nodes}
    for node in flow.order:
        if any(flow.kinds.get(value) is ValueKind.TOKEN for value in node.outputs):
            computed.get(node, tokens).rewire(node)
    _select_at_most_all(analysis, editor)
    mask_causal_operators(flow, slices, before)
    declare_shapes(analysis, plan.total, shorter)
    for state in flow.cached_states:
        _slice_state(state, computed.get(state.nodes[-1], tokens).slices)
    connect_operators()
    outputs = outputs_of_cache_length(analysis, plan.total)
    return_context_so_far(analysis, slices)
    for site in analysis.sites:
        if site.keys[0].cache_point.value not in windowed:
            grouping.regroup(site)
    own_outputs = tuple(analysis.model.graph.outputs)
    presents += [_connect_recurrence(tensor, number, lengths) for number, tensor in enumerate(plan.recurrences)]
    analysis.model.graph.outputs.extend(presents)
    outputs |= return_cached_tensors(own_outputs, lengths, all_rows)
    if plan.token_rows is not None:
        replace_token_rows(lengths, plan.token_rows, add_past_length(editor, BATCH))
    editor.finish()
    write_cache_metadata(analysis.model, cache_metadata(plan, batch_chunks=not updated, outputs=outputs))
    return editor.edits


def _add_inputs(analysis: Analysis, editor: Editor, plan: CachePlan) -> dict[CacheTensor, ir.Value]:
    """Add the cache inputs."""
    graph = analysis.model.graph
    pasts: dict[CacheTensor, ir.Value] = {}
    for recurrence in plan.recurrences:
        for name in (recurrence.past, recurrence.present):
            editor.take_name(name)
    for tensor in with_scales(plan.tensors):
        replaced = next((output for output in graph.outputs if output.name == tensor.present), None)
        if replaced is not None and tensor.kept is None and is_canonical_view(replaced, tensor.point):
            graph.outputs.remove(replaced)  # it returns the new rows, which are part of the cache output
        for name in (tensor.past, tensor.present):
            editor.take_name(name)
        shape = ir.Shape(tensor.shape(plan.past))
        pasts[tensor] = ir.Value(name=tensor.past, type=ir.TensorType(tensor.dtype), shape=shape)
        if tensor.kept is not None:
            pasts[tensor].metadata_props[LAST_ROWS] = str(tensor.kept)
    graph.inputs.extend(pasts.values())
    return pasts


def _window_rewriters(analysis: Analysis, tokens: TokenRewriter, pasts: CacheValues) -> dict[KeptRows, TokenRewriter]:
    """Return a rewriter for all rows that are kept of a window or a state, before the new tokens."""
    found: dict[KeptRows, TokenRewriter] = {}
    for tensor, past in pasts.items():
        if tensor.kept is not None and tensor.kept not in found:
            count = dim.symbol(f"last_{tensor.kept}_rows") if tensor.window is None else tensor.window.extent
            lengths = tokens.lengths.after(count, (past, tensor.axis))
            slices = ContextSlices(tokens.flow, tokens.editor, lengths, analysis.inputs, analysis.same)
            slices.window = tensor.window
            found[tensor.kept] = TokenRewriter(slices, tokens.before)
    return found


def _rewriter_of_new(analysis: Analysis, tokens: TokenRewriter) -> TokenRewriter:
    """Return a rewriter for the new tokens alone, as if they were the whole text."""
    slices = ContextSlices(tokens.flow, tokens.editor, tokens.lengths.of_new(), analysis.inputs, analysis.same)
    return TokenRewriter(slices, tokens.before)


def _connect_recurrence(tensor: RecurrentTensor, number: int, lengths: LengthValues) -> ir.Value:
    """Add the input of a recurrent state, connect it, and return its output."""
    editor, recurrent = lengths.editor, tensor.recurrent
    past = ir.Value(name=tensor.past, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
    editor.graph.inputs.append(past)
    place, operator, attributes, inputs = recurrent.axis, "Identity", {}, [recurrent.value]
    start = past
    if place is not None:
        target = lengths.reshape_target([*recurrent.sizes[:place], 1, *recurrent.sizes[place:]])
        start = editor.node("Reshape", [past, target], name=f"{tensor.past}.row", dtype=tensor.dtype)
        operator, attributes = "Gather", {"axis": place}
        inputs.append(editor.constant(-1, name="last"))
    editor.replace_input(*recurrent.start, start)
    present = editor.node(operator, inputs, attributes, name=tensor.present, dtype=tensor.dtype, shape=tensor.shape)
    mark_recurrent_state(past, present, number)
    return present


def _update_caches(
    plan: CachePlan,
    tokens: TokenRewriter,
    grouping: HeadGrouping,
    pasts: CacheValues,
    updated: CacheValues,
    windows: Mapping[KeptRows, TokenRewriter],
) -> tuple[list[ir.Value], CacheValues]:
    """Return the cache outputs, which operators compute or which are the updated inputs, and the rows to attend to."""
    presents: list[ir.Value] = []
    rows_of: dict[CacheTensor, ir.Value] = {}
    for tensor in plan.tensors:
        order = tensor.order
        if tensor in updated:
            presents.append(updated[tensor])
            all_rows = read_cache(plan, tokens.lengths, tensor, updated[tensor])
        else:
            slices = tokens.slices if tensor.kept is None else windows[tensor.kept].slices
            returned, all_rows = _updated(plan, slices, tensor, pasts)
            presents += returned
        if tensor.kept is not None:
            add_cached_rows(windows[tensor.kept], tensor.point, all_rows, order)
        else:
            grouping.add_cache(tensor.point, all_rows, order)
            rows_of[tensor] = all_rows
    return presents, rows_of


def _updated(
    plan: CachePlan, slices: ContextSlices, tensor: CacheTensor, pasts: CacheValues
) -> tuple[list[ir.Value], ir.Value]:
    """Return the cache outputs of a tensor, and all its rows in the type of the model."""
    editor, dtype = slices.editor, tensor.point.dtype
    rows = to_cache(slices.lengths, tensor.point, tensor.order)
    if tensor.bits is None:
        rows = _cast(editor, rows, dtype, tensor.dtype, f"{tensor.present}.rows")
        present, all_rows = update_cache(plan, slices, tensor, pasts[tensor], rows)
        return [present], _cast(editor, all_rows, tensor.dtype, dtype, f"{tensor.present}.wide")
    parts = zip((tensor, tensor.scale), quantize_rows(editor, tensor, rows), strict=True)
    updated = [update_cache(plan, slices, part, pasts[part], new) for part, new in parts]
    return [present for present, _ in updated], dequantize_rows(editor, tensor, *(rows for _, rows in updated))


def _cast(editor: Editor, value: ir.Value, before: ir.DataType, after: ir.DataType, name: str) -> ir.Value:
    if before is after:
        return value
    return editor.node("Cast", [value], {"to": int(after)}, name=name, dtype=after, shape=value.shape)


def _select_at_most_all(analysis: Analysis, editor: Editor) -> None:
    """Select all tokens of a call that has fewer than are asked for: negative indices would name some twice."""
    for node in analysis.flow.counts:
        op, indices = NodeBuilder(editor, f"{node.outputs[0].name}.kept", like=node), node.inputs[1]
        dtype = analysis.flow.shapes[indices].dtype or ir.DataType.INT64  # type: ignore[index]
        present = op.GreaterOrEqual(indices, op.number(0, dtype))
        editor.replace_input(node, 1, op.Compress(indices, present, axis=0))


def _slice_state(state: SequenceState, slices: ContextSlices) -> None:
    """Slice the result of a sequence state, which is computed for past and new tokens, to the new tokens."""
    value, axis = state.result, state.axes[0]
    fact = slices.flow.shapes[value]
    assert fact.shape is not None
    assert fact.dtype is not None
    bounds = [slices.lengths.flat(end) for end in slices.lengths.span(Length.NEW)]
    total, new = (
        dim_names(slices.sizes(fact.shape, (axis.with_variable(LengthVariable(length)),)))
        for length in (Length.TOTAL, Length.NEW)
    )
    inputs = [*bounds, slices.editor.constant([axis.axis], name="axes")]
    slices.editor.append_to(value, "Slice", inputs, fact.dtype, (total, new))
