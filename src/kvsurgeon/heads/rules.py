"""How other heads in the result of an operator follow from other heads in what it reads.

A rule is asked for the twin of a node; it answers None where the heads cannot be followed through it alone, as when a
`Split` takes queries, keys and values apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir

from kvsurgeon.heads.change import Change, Made
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.weights import RULES as WEIGHT_RULES
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.reduction import reduced_axes
from kvsurgeon.ops.table import names_with
from kvsurgeon.rewrite.reshape_targets import expand_target, reshape_target
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import axis_of

Rule = Callable[[Change], Made | None]

MEANS = frozenset({"ReduceMean", "ReduceMax", "ReduceMin"})  # the same over each element so many times as over each


def elementwise(change: Change) -> Made:
    """Operators that work element by element: each input that has the heads' axis is given the new heads."""
    inputs: list[ir.Value | None] = []
    for index, value in enumerate(change.node.inputs):
        place = None if value is None else heads_place(change, index)
        if value is None:
            inputs.append(None)
        elif place is None:
            inputs.append(change.beside(index))
        else:
            inputs.append(change.carried(index, change.axis.at(place)))
    return Made(inputs=inputs)


def heads_place(change: Change, index: int) -> int | None:
    """The axis of a broadcast input that holds the heads, None where it is broadcast along them."""
    shape = change.shape(index)
    place = change.axis.axis - (len(change.result) - len(shape))
    if place < 0 or (shape[place] == 1 and (change.axis.size != 1 or not change.is_projected(index))):
        return None
    return place


def first_only(change: Change) -> Made:
    """`Cast`, `Clip` and their kin: further inputs are parameters of the whole."""
    return Made(inputs=[change.carried(0, change.axis), *change.inputs[1:]])


def quantize(change: Change) -> Made:
    """`QuantizeLinear`, `DequantizeLinear`: parameters of the whole, of each place along an axis, or of blocks."""
    inputs = [change.carried(0, change.axis), *change.inputs[1:]]
    rank, axis = len(change.shape(0)), axis_of(change.call.integer("axis", 1), len(change.shape(0)))
    for index in range(1, len(inputs)):
        if not change.given(index):
            continue
        sizes = change.shape(index)
        if len(sizes) == 1 and sizes[0] != 1 and axis == change.axis.axis:
            inputs[index] = change.carried(index, change.axis.at(0))
        elif len(sizes) == rank and len(sizes) > 1:
            inputs[index] = change.carried(index, _in_blocks(change, change.shape(0), sizes))
    return Made(inputs=inputs)


def _in_blocks(change: Change, whole: Sequence[Dimension], blocks: Sequence[Dimension]) -> HeadAxis:
    axis = change.axis
    size, count = whole[axis.axis], blocks[axis.axis]
    if size == count:
        return axis
    assert isinstance(size, int)
    assert isinstance(count, int)
    width = -(-size // count)
    if size % count or not isinstance(axis.inner, int) or axis.inner % width:
        raise change.refusal(f"blocks of {width} that are quantised together lie across heads")
    return replace(axis, inner=axis.inner // width)


def transpose(change: Change) -> Made:
    """`Transpose`: axes in another order."""
    order = change.call.attribute("perm") or tuple(reversed(range(len(change.shape(0)))))
    return Made(inputs=[change.carried(0, change.axis.at(order[change.axis.axis]))])


def reshape(change: Change) -> Made | None:
    """`Reshape`: row-major order tells where the heads were; the target is derived anew."""
    before = _before_reshape(change)
    if before is None:
        return None
    after = change.scaled(change.result, change.axis)
    target = reshape_target(change.carrier.lengths, after, change.scaled(change.shape(0), before))
    return Made(inputs=[change.carried(0, before), target], without=frozenset({"allowzero", "shape"}))


def squeeze(change: Change) -> Made | None:
    """`Flatten`, `Squeeze`, `Unsqueeze`: reshapes without a target of their own."""
    before = _before_reshape(change)
    return None if before is None else Made(inputs=[change.carried(0, before), *change.inputs[1:]])


def _before_reshape(change: Change) -> HeadAxis | None:
    found = change.axis.before_reshape(change.shape(0), change.result)
    is_batch = found is not None and found.axis == 0 and found.size == 1 and change.is_token(0)
    return None if is_batch else found  # a single head is not to be taken for a batch that is fixed to 1


def expand(change: Change) -> Made:
    """`Expand`: heads that are there, or copies that become heads here."""
    place = heads_place(change, 0)
    source = change.beside(0) if place is None else change.carried(0, change.axis.at(place))
    after, before = change.scaled(change.result, change.axis), change.shape(0)
    shift = len(after) - len(before)
    kept = [at >= shift and before[at - shift] == change.result[at] for at in range(len(after))]
    return Made(inputs=[source, expand_target(change.carrier.lengths, after, kept)])


def tile(change: Change) -> Made | None:
    """`Tile`: along other axes."""
    repeats = change.call.numbers(1)
    if repeats is None or repeats[change.axis.axis] != 1:
        return None
    return Made(inputs=[change.carried(0, change.axis), change.inputs[1]])


def split(change: Change) -> Made | None:
    """`Split`: along another axis."""
    if change.takes_apart or axis_of(change.call.integer("axis", 0), len(change.result)) == change.axis.axis:
        return None
    return Made(inputs=[change.carried(0, change.axis), *change.inputs[1:]])


def slice_(change: Change) -> Made | None:
    """`Slice`: along other axes."""
    bounds = slice_bounds(change.call)
    if change.takes_apart or bounds is None or change.axis.axis in bounds[0]:
        return None
    return Made(inputs=[change.carried(0, change.axis), *change.inputs[1:]])


def gather(change: Change) -> Made | None:
    """`Gather`: places of another axis."""
    rank, picked = len(change.shape(0)), len(change.shape(1))
    axis, heads = axis_of(change.call.integer("axis", 0), rank), change.axis.axis
    if change.takes_apart or axis <= heads < axis + picked:
        return None
    before = heads if heads < axis else heads - picked + 1
    return Made(inputs=[change.carried(0, change.axis.at(before)), change.inputs[1]])


def gather_nd(change: Change) -> None:
    """`GatherND`: an exporter's way of taking queries, keys and values apart."""
    del change


def by_element(change: Change) -> Made | None:
    """`GatherElements`, `ScatterElements`: along another axis, all inputs alike."""
    if axis_of(change.call.integer("axis", 0), len(change.result)) == change.axis.axis:
        return None
    return elementwise(change)


def scatter_nd(change: Change) -> Made | None:
    """`ScatterND`: rows written at places of other axes, which are the first ones."""
    places, rank = change.shape(1), len(change.shape(0))
    depth = places[-1]
    if not isinstance(depth, int) or change.axis.axis < depth:
        return None
    behind = change.axis.axis - rank  # axes behind the places are alike in what is written and in what it goes into
    rows = change.axis.at(len(change.shape(2)) + behind)
    return Made(inputs=[change.carried(0, change.axis), change.inputs[1], change.carried(2, rows)])


def concat(change: Change) -> Made | None:
    """`Concat`: along another axis."""
    if axis_of(change.call.integer("axis", 0), len(change.result)) == change.axis.axis:
        return None
    return Made(inputs=[change.carried(index, change.axis) for index in range(len(change.node.inputs))])


def pad(change: Change) -> Made | None:
    """`Pad`: along other axes."""
    pads, rank = change.call.integers("pads", 1), len(change.result)
    places = change.call.numbers(3) if change.call.given(3) else tuple(range(rank))
    if pads is None or places is None:
        return None
    padded = {axis_of(int(axis), rank) for at, axis in enumerate(places) if pads[at] or pads[at + len(places)]}
    return None if change.axis.axis in padded else first_only(change)


def normalization(change: Change) -> Made:
    """`LayerNormalization` and its kin: over one head, or over all of them if each is there equally often."""
    rank = len(change.result)
    if change.axis.axis >= axis_of(change.call.integer("axis", -1), rank):
        change.check_even()
    return elementwise(change)


def lp_normalization(change: Change) -> Made:
    """`LpNormalization`: over one head."""
    if change.axis.axis == axis_of(change.call.integer("axis", -1), len(change.result)):
        raise change.refusal("it divides by a sum over all heads")
    return first_only(change)


def reduce(change: Change) -> Made:
    """`Reduce...`: along other axes."""
    axes = reduced_axes(change.call)
    if axes is None:
        raise change.refusal("the axes that it reduces are unknown")
    before = change.axis.axis
    if not change.call.integer("keepdims", 1):
        kept = [axis for axis in range(len(change.shape(0))) if axis not in axes]
        before = kept[change.axis.axis]
    return Made(inputs=[change.carried(0, change.axis.at(before)), *change.inputs[1:]])


def rotary(change: Change) -> Made:
    """`RotaryEmbedding`: each head alike; with heads and features on one axis it is told how many there are."""
    attributes = {}
    if len(change.result) == 3 and change.call.integer("num_heads", 0):
        attributes["num_heads"] = change.selection.size
    return Made(inputs=[change.carried(0, change.axis), *change.inputs[1:]], attributes=attributes)


def dynamic_quantize(change: Change) -> Made:
    """`DynamicQuantizeLinear`: the range of all heads is that of any that hold each equally often."""
    change.check_even()
    return Made(inputs=[change.carried(0, change.axis)], replaced=(1, 2))


RULES: dict[str, Rule] = {
    **dict.fromkeys(names_with(Trait.BROADCAST), elementwise),
    **dict.fromkeys(names_with(Trait.ELEMENTWISE) - {"Trilu", "BiasGelu", "FastGelu", "Dropout"}, first_only),
    "CastLike": first_only,
    "QuantizeLinear": quantize,
    "DequantizeLinear": quantize,
    "DynamicQuantizeLinear": dynamic_quantize,
    "Transpose": transpose,
    "Reshape": reshape,
    **dict.fromkeys(("Flatten", "Squeeze", "Unsqueeze"), squeeze),
    "Expand": expand,
    "Tile": tile,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "GatherND": gather_nd,
    **dict.fromkeys(("GatherElements", "ScatterElements"), by_element),
    "ScatterND": scatter_nd,
    "Concat": concat,
    "Pad": pad,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), normalization),
    "LpNormalization": lp_normalization,
    **{f"Reduce{kind}": reduce for kind in
       ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
    "RotaryEmbedding": rotary,
    **WEIGHT_RULES,
}  # fmt: skip
