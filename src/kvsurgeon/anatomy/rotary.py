"""Rotary embedding: how many features of a key head are multiplied by a table of positions."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import onnx_ir as ir

from kvsurgeon.analysis.token_data import is_token, upstream_tokens
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.graph.query import producers
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import find_links, has_trait

_TABLE_NODES = 61  # at most so many nodes compute a table of positions


def rotary_dim(flow: TokenFlow, place: Place, head_dim: int) -> int | None:
    """Return the number of features of a key head that are rotated; None without rotary embedding.

    Args:
        flow: The token flow of the graph.
        place: Where the keys are read.
        head_dim: Features of a key head.
    """
    node, index = place
    key = node.inputs[index]
    shares: dict[ir.Value, Fraction] = {}
    for one in sorted(producers(upstream_tokens(flow, key)), key=flow.order.__getitem__):
        if not has_trait(one, Trait.PROJECTION):
            shares |= dict.fromkeys(one.outputs, _share(flow, one, shares, head_dim))
    share = shares.get(key, Fraction()) if key is not None else Fraction()
    return round(share * head_dim) or None


def _share(flow: TokenFlow, node: ir.Node, shares: Mapping[ir.Value, Fraction], head_dim: int) -> Fraction:
    """Return the share of the features of a node's output that are rotated, from those of its inputs."""
    if node.op_type == "RotaryEmbedding":
        shape = flow.shapes[node.outputs[0]].shape or ()
        width = shape[-1] if len(shape) == 4 and isinstance(shape[-1], int) else head_dim
        return Fraction(node.attributes.get_int("rotary_embedding_dim", 0) or width, width)
    if node.op_type == "Mul" and any(_is_table(flow, node, index) for index in range(len(node.inputs))):
        return Fraction(1)
    given = [shares.get(value, Fraction()) if value is not None else Fraction() for value in node.inputs]
    if has_trait(node, Trait.SCATTER):
        written = _size_ratio(flow, node.inputs[-1], node.outputs[0])
        return given[0] * (1 - written) + given[-1] * written
    sizes = _joined_sizes(flow, node)
    if sizes is None:
        return max(given, default=Fraction())
    return sum((share * size for share, size in zip(given, sizes, strict=True)), Fraction()) / sum(sizes)


def _size_ratio(flow: TokenFlow, part: ir.Value | None, whole: ir.Value) -> Fraction:
    """Return the number of elements of a part of a tensor, as a share of the whole; 1 if it is not known."""
    shapes = [None if value is None else flow.shapes[value].shape for value in (part, whole)]
    ratio = Fraction(1)
    for size, all_of in zip(shapes[0] or (), shapes[1] or (), strict=False):
        if isinstance(size, int) and isinstance(all_of, int):
            ratio *= Fraction(size, max(1, all_of))
    return min(ratio, Fraction(1))


def _joined_sizes(flow: TokenFlow, node: ir.Node) -> list[int] | None:
    """Return how many features each input of a concatenation of features has; None for other nodes."""
    call = flow.shapes.call(node)
    links = find_links(call)
    if links is None or links.joined is None:
        return None
    axis = links.outputs[0].index(links.joined)
    sizes = [None if fact is None or fact.shape is None else fact.shape[axis] for fact in call.inputs]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None


def _is_table(flow: TokenFlow, node: ir.Node, index: int) -> bool:
    """Return whether an input has a number for each position and feature."""
    value = node.inputs[index]
    shape = None if value is None else flow.shapes[value].shape
    of_positions = (node, index) in flow.demands or _depends_on_positions_only(flow, value)
    return bool(of_positions and shape and isinstance(shape[-1], int) and shape[-1] > 1)


def _depends_on_positions_only(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Return whether token data is computed by a few nodes without a product with weights and without a norm."""
    if not is_token(flow, value):
        return False
    nodes = producers(upstream_tokens(flow, value))
    return 0 < len(nodes) <= _TABLE_NODES and not any(
        "Normalization" in node.op_type or node.op_type == "Pow" or has_trait(node, Trait.PROJECTION) for node in nodes
    )
