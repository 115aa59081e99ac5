"""Replace the values of all KV heads by one latent of lower rank, which every query head reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.calibration.head_maps import HeadMap
from kvsurgeon.calibration.low_rank import LowRankMap, low_rank_map
from kvsurgeon.calibration.merge_heads import Changes, apply_changes
from kvsurgeon.calibration.moments import SecondMoment
from kvsurgeon.calibration.readers import OutputProjection, mapped_heads
from kvsurgeon.calibration.shared_heads import SharedHeads, find_shared_heads
from kvsurgeon.calibration.token_features import token_features
from kvsurgeon.calibration.weight_products import FeatureChange, WeightProduct, combined
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.layout import Layout, NamedDims, layout_of, named_dims
from kvsurgeon.heads.layout_builder import LayoutBuilder
from kvsurgeon.symbolic.dimension import Dimension


def fit_latents(analysis: Analysis, rank: int, text: Path, folder: Path | None) -> list[LowRankMap | None]:
    """Return for the values of each layer with its own keys the map to a latent; None if they are not wider.

    The latent holds the principal components of all value heads on the first half of a text, weighted by what the
    output projections read of them.

    Raises:
        UnsupportedError: The weights of values cannot be found, something else reads them, or they are bfloat16.
    """
    trace, found = IndexTrace(analysis.flow), find_shared_heads(analysis)
    for one in found:
        if analysis.flow.shapes[one.values].dtype is ir.DataType.BFLOAT16:  # which cannot be verified after that
            raise UnsupportedError(
                "weights that become a product of two are rounded twice", code=Code.PASS_PRECONDITION,
                at=one.values.name, layer=one.layers[0], expected="float32 or float16", found="bfloat16",
                hint="convert the model to float16 first",
            )  # fmt: skip
    moments = [SecondMoment(one.value_width) for one in found]
    for features in token_features(analysis, [one.values for one in found], text, folder):
        for one, moment in zip(found, moments, strict=True):
            moment.add(features[one.values])
    maps: list[LowRankMap | None] = []
    for one, moment in zip(found, moments, strict=True):
        moment.check(one.values.name or "")
        readers = [OutputProjection.of(trace, one, context) for context in one.contexts]
        weights = [sum(parts) for parts in zip(*(reader.weights(one.kv_heads) for reader in readers), strict=True)]
        blocks = [np.asarray(block) for block in weights]
        maps.append(low_rank_map(moment.total, blocks, rank) if rank < one.value_width else None)
    return maps


def project_values(analysis: Analysis, maps: Sequence[LowRankMap | None]) -> None:
    """Change the weights of values so that they have the rank of their latent, in an unchanged graph."""
    trace = IndexTrace(analysis.flow)
    changes: Changes = []
    for one, found in zip(find_shared_heads(analysis), maps, strict=True):
        if found is None:
            continue
        product, values = mapped_heads(trace, one, one.values, one.kv_heads)
        encoders, decoders = _by_head(found, one)
        changes.append(
            (product, [
                FeatureChange(
                    target=values.columns[head], source=values.columns.reshape(-1),
                    matrix=np.concatenate([values.on_columns(decoder @ encoder).T for encoder in encoders]),
                )
                for head, decoder in enumerate(decoders)
            ])
        )  # fmt: skip
    apply_changes(analysis.model, changes)


def compute_latents(analysis: Analysis, maps: Sequence[LowRankMap | None]) -> int:
    """Compute latents instead of values, and read them by wider output projections; return the number of edits.

    Raises:
        UnsupportedError: The attention is one operator, or its values have another layout than
            `[batch, heads, sequence, head_dim]`.
    """
    trace, editor = IndexTrace(analysis.flow), Editor(analysis.model)
    layouts = LayoutBuilder(editor, analysis.inputs)
    for one, found in zip(find_shared_heads(analysis), maps, strict=True):
        if found is None:
            continue
        product, values = mapped_heads(trace, one, one.values, one.kv_heads)
        encoders, decoders = _by_head(found, one)
        matrices = [encoder @ values.matrices[0] for encoder in encoders]
        _check_constant(values, one)
        block = (values.columns.reshape(-1), np.concatenate([matrix.T for matrix in matrices]))
        latent = _copied(editor, product, [block])
        latent, one_head = _as_one_head(layouts, layout_of(trace.flow, product.features), latent, len(found.encode))
        for layer, context in zip(one.layers, one.contexts, strict=True):
            reader = OutputProjection.of(trace, one, context)
            blocks = [(rows, decoders[head]) for rows, head in zip(reader.rows, reader.reads, strict=True)]
            reading = _Reading(
                layer=layer, context=context, product=reader.product, rank=len(found.encode),
                dtype=trace.flow.shapes[product.features].dtype,
            )  # fmt: skip
            _read_latent(analysis, layouts, reading, latent, one_head, blocks)
    editor.finish()
    return editor.edits


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A layer that reads a latent: the result of its attention, and its output projection."""

    layer: int
    context: ir.Value
    product: WeightProduct
    rank: int
    dtype: ir.DataType | None  # of the latent


def _by_head(found: LowRankMap, one: SharedHeads) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the encoder and the decoder of each KV head."""
    return np.split(found.encode, one.kv_heads, axis=1), np.split(found.decode, one.kv_heads, axis=0)


def _check_constant(values: HeadMap, one: SharedHeads) -> None:
    error = np.abs(values.matrices - values.matrices[0]).max()
    if not error <= values.tolerance * np.abs(values.matrices).max():
        raise UnsupportedError(
            "values depend on the position", code=Code.UNTRACEABLE_HEADS, at=one.values.name, layer=one.layers[0]
        )


def _copied(editor: Editor, product: WeightProduct, blocks: Sequence[tuple[np.ndarray, np.ndarray]]) -> ir.Value:
    """Return a copy of a projection, biases included, that computes other features."""
    result: ir.Value | None = None
    for node in dict.fromkeys(operand.node for operand in product.operands):
        inputs = list(node.inputs)
        operands = {operand.index: operand for operand in product.operands if operand.node is node}
        for index, value in enumerate(inputs):
            if index in operands:
                inputs[index] = editor.initializer(combined(editor, operands[index], blocks))
            elif node is not product.node and value is not None:
                inputs[index] = result
        result = editor.copy(node, inputs, "latent").outputs[0]
    assert result is not None
    return result


def _as_one_head(layouts: LayoutBuilder, layout: Layout, latent: ir.Value, rank: int) -> tuple[ir.Value, NamedDims]:
    """Return a latent as `[batch, 1, sequence, rank]`, and these dimensions."""
    shape: list[Dimension] = [*layout.shape[:-1], rank]
    batch = 1 if layout.batch is None else layout.parts[layout.batch]
    tokens = [layout.parts[place] for place in layout.token_places]
    dims = [(("batch", "sequence")[place == layout.sequence], layout.parts[place]) for place in layout.token_places]
    if len(tokens) == 1:
        dims = [("batch", 1), *dims]
    named = (*dims, ("heads", 1), ("head_dim", rank))
    wanted = (("batch", batch), ("heads", 1), ("sequence", layout.parts[layout.sequence]), ("head_dim", rank))
    sizes = [size for _, size in wanted]
    return layouts.gather_heads(latent, shape, named, np.zeros(1, int), wanted, sizes), wanted


def _read_latent(
    analysis: Analysis, layouts: LayoutBuilder, reading: _Reading, latent: ir.Value, one_head: NamedDims,
    blocks: Sequence[tuple[np.ndarray, np.ndarray]],
) -> None:  # fmt: skip
    """Connect the attention of a layer to a latent, and its output projection to the result."""
    site, flow, editor = analysis.sites[reading.layer], analysis.flow, layouts.editor
    node, index = site.values[0].place
    before = layout_of(flow, reading.context)
    values, below = node.inputs[index], layout_of(flow, reading.product.features)
    heads = before.width // int(before.parts[-1])
    if node.op_type != "MatMul" or index != 1 or values is None or below.shape[-1] != below.width:
        raise _not_readable(reading, node.op_type)
    operand = layout_of(flow, values)
    named: NamedDims = ()
    value_heads = operand.width // int(operand.parts[-1])
    by_head = operand.shape == operand.parts and operand.sequence == 2 and operand.batch in (0, None)
    if len(operand.shape) != 4 or not by_head:
        named = named_dims(operand, value_heads, values) if value_heads in (1, heads) else ()
        if not named or named[-1] != ("head_dim", operand.shape[-1]):
            raise _not_readable(reading, f"values {list(operand.shape)}")
    types = [flow.shapes[one].dtype for one in (values, reading.context, reading.product.features)]
    latent = _as_type(editor, latent, reading.dtype, types[0])
    if (
        named
    ):  # heads share an axis with the batch, or are no axis along which the product would read one latent for all
        wanted = tuple((name, reading.rank if name == "head_dim" else size) for name, size in named)
        repeated = np.zeros(value_heads, dtype=int)
        shape = [*operand.shape[:-1], reading.rank]
        latent = layouts.gather_heads(latent, [size for _, size in one_head], one_head, repeated, wanted, shape)
    context = editor.copy(node, [node.inputs[0], latent], "latent").outputs[0]
    parts = [*before.parts[:-1], reading.rank]
    context = _as_type(editor, context, types[1], types[2])
    value = layouts.reshape(context, [*before.shape[:-1], reading.rank], parts)
    places = [place for place in (before.batch, before.sequence) if place is not None]
    if below.batch is not None and below.sequence < below.batch:
        places.reverse()
    value = layouts.transpose(value, [*places, *before.feature_places])
    moved = [parts[place] for place in (*places, *before.feature_places)]
    value = layouts.reshape(value, moved, [*below.shape[:-1], heads * reading.rank])
    product = reading.product
    (weights,) = product.operands
    place = list(product.node.inputs).index(product.features)
    wider = editor.initializer(combined(editor, weights, blocks))
    editor.replace_input(product.node, place, value)
    editor.replace_input(product.node, weights.index, wider)


def _not_readable(reading: _Reading, found: str) -> UnsupportedError:
    return UnsupportedError(
        "the values of this attention cannot be read as one latent", code=Code.UNTRACEABLE_HEADS,
        at=reading.context.name, layer=reading.layer, found=found,
        expected="MatMul with values whose last axis is that of features",
        hint="run einsum-to-matmul first" if found == "Einsum" else None,
    )  # fmt: skip


def _as_type(editor: Editor, value: ir.Value, before: ir.DataType | None, after: ir.DataType | None) -> ir.Value:
    if before is after or after is None:
        return value
    return editor.node("Cast", [value], {"to": after}, name=f"{value.name}.cast", dtype=after)
