"""Latents: keys and values that are a linear map of fewer features of the same token, at every position.

In multi-head latent attention the keys and values of all heads are `latent @ weights`, and all heads share one part of
their keys that has a rotary embedding. The latent and this part, L, are all that a cache needs: with keys L A and
values L C of a head, queries (L A)^T = (queries A^T) L^T and weights (L C) = (weights L) C.

A cut of the graph gives the features: everything between them and the products moves elements or multiplies them with
constants. The maps are computed by running this part on the unit vectors, and checked on other numbers.
Source: DeepSeek-AI, "DeepSeek-V2", 2024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.cache_points import cache_point_of
from kvsurgeon.analysis.probe_inputs import Rows, run_dtype
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import is_token, token_inputs
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.query import upstream
from kvsurgeon.heads.layout_builder import LayoutBuilder
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

_MOVES = (Trait.IDENTITY, Trait.TRANSPOSE, Trait.RESHAPE, Trait.REPEAT, Trait.SELECT, Trait.SCATTER, Trait.MOVE)
_LINEAR = (Trait.PROJECTION, Trait.SCALE, Trait.ADD)
_CHECKED = 3  # further tokens on which the maps are checked
_BOUND = 1e-4  # of the largest number
_BOUNDS = {ir.DataType.FLOAT16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The features from which the keys and values of all heads of an attention are computed.

    Attributes:
        parts: Values that hold them, [batch, sequence, features] but for axes of 1, in order.
        widths: Number of features of each.
        keys: The map to the keys of each head, [heads, head_dim, features].
        values: The map from the features to the values of each head, [heads, features, head_dim].
    """

    parts: tuple[ir.Value, ...]
    widths: tuple[int, ...]
    keys: np.ndarray
    values: np.ndarray

    @property
    def width(self) -> int:
        """Number of features."""
        return sum(self.widths)


def find_latent(flow: TokenFlow, site: AttentionSite) -> Latent | None:
    """Return the latent of an attention; None if keys and values are not computed from fewer features.

    Raises:
        UnsupportedError: They are, but not in a form in which the products can read the latent.
    """
    operands = [site.keys[0].place, site.values[0].place]
    keys, values = (node.inputs[index] for node, index in operands)
    assert keys is not None
    assert values is not None
    parts = _smallest_cut(flow, (keys, values))
    widths = tuple(width for part in parts if (width := _width(flow, part)) is not None)
    if len(widths) < len(parts) or sum(widths) >= sum(point.elements for _, point in site.cached_tensors):
        return None
    _check_products(flow, site, keys, values)
    by_keys, by_values = _maps(flow, site, parts, widths, (keys, values))
    return Latent(parts=parts, widths=widths, keys=by_keys, values=by_values)


def _smallest_cut(flow: TokenFlow, operands: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
    """Return values with as few features as possible from which some operands follow without other token data.

    Each value takes the smallest cut of what it is computed from, if that is not larger than itself.
    """
    found: dict[ir.Value, tuple[ir.Value, ...]] = {}
    visited = upstream(operands, inputs=lambda node: _linear_inputs(flow, node))
    for value in sorted(visited, key=flow.position):
        node, own = value.producer(), _width(flow, value)
        sources = [] if node is None else _linear_inputs(flow, node)
        cut = tuple(dict.fromkeys(part for source in sources for part in found.get(source, (source,))))
        width = sum(_width(flow, part) or 0 for part in cut)
        is_known = bool(cut) and all(_width(flow, part) is not None for part in cut)
        smaller = is_known and (own is None or (width, len(cut)) <= (own, 1))
        found[value] = cut if smaller else (value,)
    return tuple(dict.fromkeys(part for operand in operands for part in found[operand]))


def _linear_inputs(flow: TokenFlow, node: ir.Node) -> list[ir.Value]:
    """Return the token data that a node moves or multiplies with constants; none for another node."""
    tokens = token_inputs(flow, node)
    if has_trait(node, *_MOVES):
        return list(tokens)
    others = [value for value in node.inputs if value is not None and value not in tokens]
    is_linear = has_trait(node, *_LINEAR) and not (len(tokens) > 1 and not has_trait(node, Trait.ADD))
    is_constant = all(flow.kinds.get(value, ValueKind.CONSTANT) is ValueKind.CONSTANT for value in others)
    return list(tokens) if is_linear and is_constant else []


def _width(flow: TokenFlow, value: ir.Value) -> int | None:
    """Return the features of token data that is [batch, sequence, features] but for axes of 1 and parts of features."""
    point = cache_point_of(flow, value) if is_token(flow, value) else None
    if point is None or point.rank != len(point.parts):
        return None
    sequence = point.parts.index(None)
    ahead = [size for place, size in enumerate(point.parts[:sequence]) if place not in point.order[:1] or size == 1]
    return point.elements if all(size == 1 for size in ahead) and point.order[0] < sequence else None


def _check_products(flow: TokenFlow, site: AttentionSite, keys: ir.Value, values: ir.Value) -> None:
    """Check that the products are queries @ keys^T and weights @ values, with heads on one axis.

    Raises:
        UnsupportedError: They are not.
    """
    expected = "one product of queries with keys, and one of weights with values"
    if len(site.scores) != 1 or len(site.products) != 1 or site.other_inputs:
        raise _not_readable(site, expected, site.products_found())
    score, product = site.scores[0], site.products[0]
    places = (score.node.op_type, score.key_index(), product.node.op_type, product.value)
    if places != ("MatMul", 1, "MatMul", 1):
        found = "{} with keys at index {}, {} with values at index {}".format(*places)
        raise _not_readable(site, "MatMul with keys and with values at index 1", found)
    operands = [value for value in (keys, values, score.node.inputs[0]) if value is not None]
    shapes = [flow.shapes[value].shape or () for value in operands]
    sequence = [flow.axes[value][0].axis for value in (keys, values)]
    heads = {shape[1] for shape in shapes if len(shape) == 4}
    if any(len(shape) != 4 for shape in shapes) or sequence != [3, 2] or len(heads) != 1:
        raise _not_readable(site, "[batch, heads, sequence, head_dim]", ", ".join(map(str, shapes)))


def _maps(
    flow: TokenFlow, site: AttentionSite, parts: Sequence[ir.Value], widths: Sequence[int], operands: Sequence[ir.Value]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the maps from the features to keys and to values.

    Raises:
        UnsupportedError: Keys or values are not linear in the features, or depend on the position.
    """
    width, stops = sum(widths), frozenset(parts)
    reached = list(upstream(operands, stop=stops.__contains__, inputs=lambda node: node.inputs))
    weights = {one: tensor for one in reached if (tensor := constant_tensor(one)) is not None and is_weight(tensor)}
    runner = SubgraphRunner(flow, operands, given=[*parts, *weights])
    for name, tensor in ((value.name or "", tensor) for value, tensor in weights.items()):
        if name in runner.inputs.types:  # the content of others does not count
            runner.inputs.give(name, partial(_array, tensor))
    further = np.random.default_rng(0).standard_normal((_CHECKED, width))
    rows = np.concatenate([np.eye(width), np.zeros((1, width)), further])
    found = [_run(runner, flow, parts, widths, tokens) for tokens in (rows, rows[::-1])]
    (keys, values), backwards = found[0], [array[..., ::-1, :] for array in found[1]]
    bound = _BOUNDS.get(flow.shapes[operands[0]].dtype or ir.DataType.FLOAT, _BOUND)
    for array, other in zip((keys, values), backwards, strict=True):
        linear = rows @ array[:, :width]
        if not max(np.abs(linear - array).max(), np.abs(linear - other).max()) <= bound * np.abs(array).max():
            names = ", ".join(part.name or "" for part in parts)
            expected = f"keys and values that are a linear map of the {width} features of {names}, without a bias"
            raise _not_readable(site, expected, "another map")
    return keys[:, :width].transpose(0, 2, 1), values[:, :width]


def _run(
    runner: SubgraphRunner, flow: TokenFlow, parts: Sequence[ir.Value], widths: Sequence[int], tokens: np.ndarray
) -> list[np.ndarray]:
    """Return keys and values of tokens with some features, each [heads, tokens, head_dim]."""
    batch, length = (
        size if isinstance(size, int) else other for size, other in ((flow.batch, 2), (flow.length, len(tokens)))
    )
    padding = np.zeros((-len(tokens) % length, tokens.shape[1]))
    calls = np.split(np.concatenate([tokens, padding]), range(length, len(tokens), length))
    found = [_run_call(runner, flow, parts, widths, call, batch) for call in calls]
    return [np.concatenate(arrays, axis=1)[:, : len(tokens)] for arrays in zip(*found, strict=True)]


def _run_call(
    runner: SubgraphRunner,
    flow: TokenFlow,
    parts: Sequence[ir.Value],
    widths: Sequence[int],
    tokens: np.ndarray,
    batch: int,
) -> list[np.ndarray]:
    starts = np.cumsum([0, *widths])
    for part, start, end in zip(parts, starts, starts[1:], strict=False):

        def feed(given: Rows, start: int = start, end: int = end, part: ir.Value = part) -> np.ndarray:
            shape = given.sizes(flow.shapes[part].shape or (), flow.axes[part])
            dtype = run_dtype(flow.shapes[part].dtype or ir.DataType.FLOAT).numpy()
            rows = np.broadcast_to(tokens[:, start:end], (given.batch, len(tokens), end - start))
            return rows.reshape(shape).astype(dtype)

        runner.inputs.give(part.name or "", feed)
    keys, values = (array[0].astype(np.float64) for array in runner.run(len(tokens), batch=batch))
    return [keys.transpose(0, 2, 1), values]


def _array(tensor: ir.TensorProtocol, _rows: Rows) -> np.ndarray:
    return np.asarray(tensor.numpy()).astype(run_dtype(tensor.dtype).numpy())


def read_latents(analysis: Analysis, latents: Mapping[int, Latent]) -> int:
    """Connect the products of some attention sites to latents, and return the number of edits.

    Args:
        analysis: Analysis of a model without a cache; its graph is changed.
        latents: The latents by the index of the attention site.
    """
    flow, editor = analysis.flow, Editor(analysis.model)
    layouts = LayoutBuilder(editor, analysis.inputs)
    for index, latent in latents.items():
        score, product = analysis.sites[index].scores[0].node, analysis.sites[index].products[0].node
        queries, keys, context = score.inputs[0], score.inputs[1], product.outputs[0]
        assert queries is not None
        assert keys is not None
        dtype = flow.shapes[keys].dtype or ir.DataType.FLOAT
        op = NodeBuilder(editor, f"{context.name}.latent", like=product)
        rows = _rows(op, layouts, flow, latent, dtype)
        shared = op.Expand(rows, op.int64([1, len(latent.keys), 1, 1]))
        editor.replace_input(score, 0, op.MatMul(queries, op.constant(latent.keys.astype(dtype.numpy()))))
        editor.replace_input(score, 1, op.Transpose(shared, perm=[0, 1, 3, 2]))
        summed = editor.copy(product, [product.inputs[0], shared], "latent").outputs[0]
        editor.replace(context, op.MatMul(summed, op.constant(latent.values.astype(dtype.numpy()))))
    editor.finish()
    return editor.edits


def _rows(op: NodeBuilder, layouts: LayoutBuilder, flow: TokenFlow, latent: Latent, dtype: ir.DataType) -> ir.Value:
    """Return the features of a latent as [batch, 1, sequence, features]."""
    found = []
    for part, width in zip(latent.parts, latent.widths, strict=True):
        fact = flow.shapes[part]
        assert fact.shape is not None
        point = cache_point_of(flow, part)
        assert point is not None
        rows = layouts.reshape(part, fact.shape, [point.batch, 1, flow.length, width])
        found.append(rows if fact.dtype is dtype else op.Cast(rows, to=dtype))
    return found[0] if len(found) == 1 else op.Concat(*found, axis=-1)


def _not_readable(site: AttentionSite, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(
        "attention cannot read the latent of its keys and values", code=Code.UNTRACEABLE_HEADS, at=site.at.name,
        expected=expected, found=found, hint="run einsum-to-matmul first" if "Einsum" in found else None,
    )  # fmt: skip
