"""Products that broadcast each KV head to a group of query heads.

`[batch, kv_heads, group * length, head_dim] @ [batch, kv_heads, head_dim, length]` is one product for a whole group.
With another number of KV heads the groups are others; the operands and the result keep their outer layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.layout import NamedDims
from kvsurgeon.heads.layout_builder import LayoutBuilder
from kvsurgeon.heads.repetition import find_repetition
from kvsurgeon.ops.contraction import Contraction
from kvsurgeon.ops.table import contraction_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, Dimension

# Dimensions of the query operand in the order of a regrouped product. The heads of keys are "kv_heads", those that only
# queries have are "group", and what the product sums is "summed".
_ORDER = ("batch", "kv_heads", "group", "sequence", "summed")


def key_heads_read(analysis: Analysis, layer: int) -> tuple[int, ...]:
    """Return for each query head of a layer, in the order of its product, the KV head that it reads.

    Raises:
        UnsupportedError: The heads cannot be traced.
    """
    site, flow = analysis.sites[layer], analysis.flow
    counts = counts_of(flow, site)
    heads = np.arange(counts.heads)
    if counts.kv_heads != counts.heads:
        repetition = find_repetition(IndexTrace(flow), layer, site, site.keys[0], counts)
        if repetition.sharing == "repeated":
            heads = repetition.heads
        elif repetition.sharing == "native":
            heads = heads // (counts.heads // counts.kv_heads)
        else:
            dims = [one for axis in query_dims(flow, repetition.operand.place) for one in axis]
            sizes = [(name, int(size)) for name, size in dims if name in ("kv_heads", "group")]
            shape = [size if name == "kv_heads" else 1 for name, size in sizes]
            numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
            heads = np.broadcast_to(numbers, [size for _, size in sizes]).reshape(-1)
    return tuple(heads.tolist())


def _contraction_at(flow: TokenFlow, place: Place) -> tuple[Contraction, int]:
    """The contraction of a product, and the index of its other operand."""
    node, index = place
    found = contraction_of(flow.shapes.call(node))
    if found is None:
        raise UnsupportedError(
            "cannot trace heads through a product of more than two tensors", code=Code.UNTRACEABLE_HEADS,
            at=node.outputs[0].name,
        )  # fmt: skip
    return found, found.left if index == found.right else found.right


def query_dims(flow: TokenFlow, place: Place) -> list[NamedDims]:
    """Return the dimensions on each axis of the operand that is multiplied with the keys or values at `place`.

    Raises:
        UnsupportedError: Query heads cannot be distinguished from other dimensions.
    """
    node, index = place
    found, other = _contraction_at(flow, place)
    labels, key_labels = found.left_labels, found.right_labels
    if other == found.right:
        labels, key_labels = key_labels, labels
    value, keys = node.inputs[other], node.inputs[index]
    assert value is not None
    assert keys is not None
    key_shape = flow.shapes[keys].shape or ()
    sequence = {axis.axis: axis for axis in flow.axes.get(value, ())}
    dims: list[NamedDims] = []
    for axis, (label, size) in enumerate(zip(labels, flow.shapes[value].shape or (), strict=True)):
        if label in found.summed:
            dims.append((("summed", size),))
        elif axis in sequence:
            outer, inner = (_heads(one, "group", value) for one in (sequence[axis].outer, sequence[axis].inner))
            dims.append((*outer, ("sequence", flow.length), *inner))
        elif axis == 0 and isinstance(flow.batch, int) and size == flow.batch:
            dims.append((("batch", size),))
        else:
            in_keys = label in key_labels and key_shape[key_labels.index(label)] != 1
            dims.append(_heads(size, "kv_heads" if in_keys else "group", value))
    return dims


def _heads(size: Dimension, name: str, value: ir.Value) -> NamedDims:
    """The dimensions on an axis, or on a part of one, besides tokens: the batch, heads, both, or none."""
    if isinstance(size, int):
        return () if size == 1 else ((name, size),)
    rest = dim.exact_quotient(size, BATCH)
    if not isinstance(rest, int):
        raise _indistinct_heads(value, found=str(size))
    return (("batch", BATCH),) if rest == 1 else (("batch", BATCH), (name, rest))


def _indistinct_heads(value: ir.Value, found: str | None = None) -> UnsupportedError:
    return UnsupportedError(
        "cannot distinguish query heads from other dimensions", code=Code.UNTRACEABLE_HEADS, at=value.name, found=found
    )


def grouped_dims(flow: TokenFlow, place: Place, dims: NamedDims) -> NamedDims:
    """Return keys or values of these dimensions in the order in which `regroup_product` reads them."""
    sizes = dict(dims)
    if not any(name == "batch" for axis in query_dims(flow, place) for name, _ in axis):
        sizes.pop("batch", None)  # fixed to 1, without an axis in the queries
    node, index = place
    found, other = _contraction_at(flow, place)
    labels = found.right_labels if other == found.left else found.left_labels
    value = node.inputs[index]
    sums_tokens = value is not None and any(labels[one.axis] in found.summed for one in flow.axes.get(value, ()))
    last = ("sequence", "head_dim") if sums_tokens else ("head_dim", "sequence")
    return tuple((name, sizes[name]) for name in ("batch", "heads", *last) if name in sizes)


def regroup_product(
    flow: TokenFlow, layouts: LayoutBuilder, place: Place, keys: ir.Value, kv_heads: int, heads: int
) -> None:
    """Replace a product by one with other groups of query heads.

    Args:
        flow: Token data of the decoder.
        layouts: Adds nodes.
        place: The keys or values in the product.
        keys: New keys or values, in the order of `grouped_dims`.
        kv_heads: New number of KV heads.
        heads: Number of query heads.

    Raises:
        UnsupportedError: The product has no such form.
    """
    node = place[0]
    output = node.outputs[0]
    found, other = _contraction_at(flow, place)
    axes = query_dims(flow, place)
    value = node.inputs[other]
    assert value is not None
    dims = [one for axis in axes for one in axis]
    if dim.product(size for name, size in dims if name in ("kv_heads", "group")) != heads:
        raise _indistinct_heads(output)

    def grouped(dims: Sequence[tuple[str, Dimension]]) -> list[Dimension]:
        """[batch, kv_heads, group * length, width]."""
        batch, width = ([size for name, size in dims if name == wanted] for wanted in ("batch", "summed"))
        return [*batch, kv_heads, dim.multiply(flow.length, heads // kv_heads), width[0]]

    sizes, order = [size for _, size in dims], _sorted(dims)
    queries = layouts.reshape(value, flow.shapes[value].shape or (), sizes)
    queries = layouts.transpose(queries, order)
    queries = layouts.reshape(queries, [sizes[at] for at in order], grouped(dims))
    result = _product(layouts, place, found, queries, keys)

    # Back to the shape of the old result: the label that queries do not have takes the place of the summed one.
    shape = flow.shapes[output].shape or ()
    labels = found.left_labels if other == found.left else found.right_labels
    dims = [
        one
        for axis, label in enumerate(found.result_labels)
        for one in (axes[labels.index(label)] if label in labels else (("summed", shape[axis]),))
    ]
    sizes, order = [size for _, size in dims], _sorted(dims)
    result = layouts.reshape(result, grouped(dims), [sizes[at] for at in order])
    result = layouts.transpose(result, [order.index(at) for at in range(len(dims))])
    result = layouts.reshape(result, sizes, shape)
    for user, at in tuple(output.uses()):
        layouts.editor.replace_input(user, at, result)


def _sorted(dims: Sequence[tuple[str, Dimension]]) -> list[int]:
    return sorted(range(len(dims)), key=lambda at: _ORDER.index(dims[at][0]))


def _product(layouts: LayoutBuilder, place: Place, found: Contraction, queries: ir.Value, keys: ir.Value) -> ir.Value:
    """The product of regrouped queries and keys, as a `MatMul` or a copy of an operator that batches like one."""
    node, index = place
    output = node.outputs[0]
    if node.op_type in ("MatMul", "Einsum"):
        name = f"{output.name}.regrouped"
        return layouts.editor.node("MatMul", [queries, keys], name=name, dtype=output.dtype)
    if index == found.left or node.op_type == "Gemm":
        raise UnsupportedError(
            f"cannot regroup the query heads of {node.op_type}", code=Code.UNTRACEABLE_HEADS, at=output.name
        )
    inputs = list(node.inputs)
    inputs[found.left], inputs[found.right] = queries, keys
    return layouts.editor.copy(node, inputs, "regrouped", frozenset({"transA", "transB"})).outputs[0]
