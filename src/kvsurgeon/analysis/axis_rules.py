"""Operators along named axes of token data: allowed where the axis holds no tokens, or holds the keys of a query."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvsurgeon.analysis.elementwise_rules import align, broadcast, is_of_stream
from kvsurgeon.analysis.token_flow import PER_CALL, NodeVisit
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.ops.layout import joined_inputs
from kvsurgeon.ops.reduction import reduced_axes
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis


def forbid(step: NodeVisit, axes: Axes, along: Iterable[int]) -> None:
    """Refuse an operator that works along an axis of the stream; along an open one it says that these are the keys."""
    worked, shape = set(along), step.shape(0)
    for axis in axes:
        if axis.axis in worked:
            step.works_along(axis)
    if any(step.is_batch(shape[place]) for place in worked):
        raise step.refusal("it mixes the sequences of a batch, and what is masked in one reaches the others")


def softmax(step: NodeVisit) -> list[Axes]:
    """`Softmax` and its kin: along one axis, before opset 13 along all behind it."""
    rank = len(step.shape(0))
    old = step.call.integer("opset", step.call.opset) < 13  # which a quantised one states
    axis = axis_of(step.call.integer("axis", 1 if old else -1), rank)
    forbid(step, step.axes(0), range(axis, rank) if old else (axis,))
    return [step.axes(0)] * len(step.node.outputs)


def normalization(step: NodeVisit) -> list[Axes]:
    """`LayerNormalization` and its kin: along all axes from `axis` on; further inputs are broadcast or added."""
    rank = len(step.shape(0))
    axis = axis_of(step.call.integer("axis", -1), rank)
    forbid(step, step.axes(0), range(axis, rank))
    axes = broadcast(step)[0]
    return [axes] * len(step.node.outputs)


def by_channel(step: NodeVisit) -> list[Axes]:
    """`InstanceNormalization`, `GroupNormalization`: along all axes behind the batch, channels grouped or not."""
    grouped = step.node.op_type == "GroupNormalization"
    forbid(step, step.axes(0), range(1 if grouped else 2, len(step.shape(0))))
    return [step.axes(0)]


def lp_normalization(step: NodeVisit) -> list[Axes]:
    """`LpNormalization`: along one axis."""
    axis = axis_of(step.call.integer("axis", -1), len(step.shape(0)))
    forbid(step, step.axes(0), (axis,))
    return [step.axes(0)]


def reduce(step: NodeVisit) -> list[Axes]:
    """`Reduce...`: along named axes."""
    axes = reduced_axes(step.call)
    if axes is None:
        raise step.refusal("the axes that it reduces are unknown")
    forbid(step, step.axes(0), axes)
    return [_without(step.axes(0), axes, bool(step.call.integer("keepdims", 1)))]


def global_pool(step: NodeVisit) -> list[Axes]:
    """`GlobalAveragePool` and its kin: along all axes behind the channels."""
    forbid(step, step.axes(0), range(2, len(step.shape(0))))
    return [tuple(axis for axis in step.axes(0) if axis.axis < 2)]


def arg_extreme(step: NodeVisit) -> list[Axes]:
    """`ArgMax`, `ArgMin`: along one axis."""
    axis = axis_of(step.call.integer("axis", 0), len(step.shape(0)))
    forbid(step, step.axes(0), (axis,))
    return [_without(step.axes(0), (axis,), bool(step.call.integer("keepdims", 1)))]


def _without(axes: Axes, gone: tuple[int, ...], keep: bool) -> Axes:
    left = [axis for axis in axes if axis.axis not in gone]
    if keep:
        return tuple(left)
    return tuple(axis.at(axis.axis - sum(place < axis.axis for place in gone)) for axis in left)


def top_k(step: NodeVisit) -> list[Axes]:
    """`TopK`: along one axis."""
    axis = axis_of(step.call.integer("axis", -1), len(step.shape(0)))
    forbid(step, step.axes(0), (axis,))
    sorted_whole = dim.is_equal(step.result_shape()[axis], step.shape(0)[axis])
    for held in step.axes(0):
        if held.axis == axis and sorted_whole:
            step.parameter((1,), held.role)
    return [tuple(held for held in step.axes(0) if held.axis != axis or sorted_whole)] * 2


def cumulative_sum(step: NodeVisit) -> list[Axes]:
    """`CumSum`: along one axis."""
    axis = step.call.numbers(1)
    if axis is None or not isinstance(axis[0], int):
        raise step.refusal("the axis that it sums along is unknown")
    forbid(step, step.axes(0), (axis_of(axis[0], len(step.shape(0))),))
    return [step.axes(0)]


def concat(step: NodeVisit) -> list[Axes]:
    """`Concat`: along an axis without tokens, or of extra columns to the keys of a query (attention sinks)."""
    rank = len(step.result_shape())
    joined = axis_of(step.call.integer("axis", 0), rank)
    found: dict[int, SequenceAxis] = {}
    owner: dict[int, int] = {}
    indices = [index for index in joined_inputs(step.call) if step.shape(index)[joined] != 0]
    if len(indices) == 1 and step.kind(indices[0]) is ValueKind.TOKEN:
        return [step.axes(indices[0])]  # joined to nothing
    for index in sorted(set(step.tokens()) & set(indices), key=lambda index: is_of_stream(step.axes(index))):
        for axis in step.axes(index):
            if axis.axis == joined:
                if axis.role.resolved() is Length.NEW:
                    raise _joined(step, index)
                step.works_along(axis)
                found.setdefault(joined, _beside_others(step, index, axis, indices))
            elif axis.axis in found:
                found[axis.axis] = step.meet((owner[axis.axis], found[axis.axis]), (index, axis))
            else:
                found[axis.axis], owner[axis.axis] = axis, index
    for index in indices:
        others = {axis: at for axis, at in found.items() if axis != joined}
        if step.kind(index) is ValueKind.TOKEN:
            _must_have(step, index, others)
        else:
            _demand_unsqueezed(step, index, others)
    return [tuple(found[axis] for axis in sorted(found))]


def _beside_others(step: NodeVisit, index: int, axis: SequenceAxis, indices: Sequence[int]) -> SequenceAxis:
    """The keys' axis with what is joined to it, where that has a fixed number of places."""
    rows = {other: step.shape(other)[axis.axis] for other in indices if other != index}
    ahead, behind = ([size for other, size in rows.items() if (other < index) is before] for before in (True, False))
    if not all(isinstance(size, int) for size in (*ahead, *behind)):
        return axis
    return axis.widened(sum(ahead), sum(behind))


def _joined(step: NodeVisit, index: int) -> UnsupportedError:
    """Why tokens cannot be joined to something: a past, or tokens of the model's own."""
    for other, value in enumerate(step.node.inputs):
        for _ in range(8):
            node = None if value is None else value.producer()
            if node is None:
                break
            value = node.inputs[0] if node.inputs else None
        if other != index and value is not None and value.is_graph_input() and not value.is_initializer():
            return UnsupportedError(
                "the model already has a cache", at=value.name, expected="a model exported without one",
                found="a graph input that is joined to the tokens",
            )  # fmt: skip
    return step.mixing()


def _must_have(step: NodeVisit, index: int, found: dict[int, SequenceAxis]) -> None:
    have = {axis.axis for axis in step.axes(index)}
    for axis in found:
        if axis not in have:
            raise step.refusal("a tensor's tokens were lost sight of", at=step.node.inputs[index])


def _demand_unsqueezed(step: NodeVisit, index: int, found: dict[int, SequenceAxis]) -> None:
    """Context joined to tokens has the same axes, none of them broadcast."""
    step.demand(index, tuple(found.values()))


def pad(step: NodeVisit) -> list[Axes]:
    """`Pad`: along axes without tokens."""
    pads = step.call.integers("pads", 1)
    rank = len(step.shape(0))
    if pads is None:
        raise step.refusal("what it pads by is unknown")
    places = step.call.numbers(3) if step.call.given(3) else tuple(range(rank))
    if places is None:
        raise step.refusal("the axes that it pads are unknown")
    named = [axis_of(int(axis), rank) for axis in places]
    rows = {axis: (pads[place], pads[place + len(named)]) for place, axis in enumerate(named)}
    padded = {axis: ends for axis, ends in rows.items() if any(ends)}
    forbid(step, step.axes(0), padded)
    return [tuple(axis.widened(*padded.get(axis.axis, (0, 0))) for axis in step.axes(0))]


def convolution(step: NodeVisit) -> list[Axes]:
    """`Conv` on [batch, channels, positions...]: position by position along axes on which the kernel is one wide."""
    kernel = 3 if step.node.op_type == "QLinearConv" else 1
    for axis in step.axes(0):
        if axis.axis == 1 or (axis.axis >= 2 and not _one_by_one(step, axis.axis - 2, step.shape(kernel)[axis.axis])):
            raise step.mixing()
    measured = (2,) if step.node.op_type == "ConvInteger" else ()  # the zero point of tokens quantised in this call
    if any(step.kind(i) is not ValueKind.CONSTANT for i in range(1, len(step.node.inputs)) if i not in measured):
        raise step.refusal("its kernel is no constant")
    return [step.axes(0)]


def pool(step: NodeVisit) -> list[Axes]:
    """`AveragePool`, `MaxPool` on [batch, channels, positions...]: as a convolution, each channel by itself."""
    if step.call.integer("channels_last", 0):
        raise step.refusal("its channels lie last, for which there is no rule")
    if len(step.node.outputs) > 1 and step.node.outputs[1].uses():
        raise step.refusal("where its windows' maxima lie depends on the number of tokens")
    sizes = step.call.attribute("kernel_shape")
    for axis in step.axes(0):
        if axis.axis >= 2 and not _one_by_one(step, axis.axis - 2, sizes[axis.axis - 2]):
            raise step.mixing()
    return [step.axes(0)] * len(step.node.outputs)


def _one_by_one(step: NodeVisit, place: int, kernel: Dimension) -> bool:
    """Whether a window that moves along a place of its own sees one element at a time, and each."""
    strides, pads = step.call.attribute("strides"), step.call.attribute("pads") or ()
    count = len(pads) // 2
    padded = any(pads[end] for end in (place, place + count)) if pads else False
    automatic = step.call.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return kernel == 1 and (not strides or strides[place] == 1) and not padded and not automatic


def rotary(step: NodeVisit) -> list[Axes]:
    """`RotaryEmbedding`: tokens stay; the tables are aligned with the sequence axis of the input."""
    axes = step.axes(0)
    rank = len(step.shape(0))
    microsoft = step.node.domain == "com.microsoft"
    positions, tables = (1, (2, 3)) if microsoft else (3, (1, 2))
    several = step.node.op_type == "MRotaryEmbedding"  # positions [3, batch, sequence]
    sequence = next((axis for axis in axes if axis.axis == (2 if rank == 4 else 1)), None)
    if sequence is None or not sequence.is_plain or len(axes) > 1:
        raise step.refusal("its input does not hold the tokens where the operator expects them")
    for index in (positions, *tables):
        if index >= len(step.node.inputs) or step.node.inputs[index] is None or step.kind(index) is ValueKind.TOKEN:
            continue
        shape = step.shape(index)
        if index == positions and len(shape) < 2:
            raise step.refusal(
                "its positions are one number for the whole call",
                hint="export with positions for each token",
            )
        if index == positions or len(shape) == 3:
            place = 2 if several and index == positions else 1
            align(step, index, {place: sequence.at(place)}, len(shape))
    return [axes]


def experts(step: NodeVisit) -> list[Axes]:
    """`MoE`, `QMoE`: each token by itself, [tokens, hidden] or [batch, sequence, hidden]; its scores [tokens, experts].

    The scores may have the batch and the sequence on one axis where the tokens have them on two.
    """
    axes = step.axes(0)
    for index in step.tokens():
        held = step.axes(index)
        tokens = dim.product([size for size in step.shape(index)[:-1]])
        if len(held) != 1 or held[0].axis == len(step.shape(index)) - 1 or held[0].inner != 1:
            raise step.refusal("its input does not hold a token in each row", at=step.node.inputs[index])
        if not dim.is_equal(tokens, dim.product(step.shape(0)[:-1])) or not is_of_stream(held):
            raise step.refusal("its input does not hold a token in each row", at=step.node.inputs[index])
    if any(step.kind(index) is not ValueKind.TOKEN for index in (0, 1)):
        raise step.refusal("which expert takes a token does not depend on it")
    return [axes]


def dynamic_quantize(step: NodeVisit) -> list[Axes]:
    """`DynamicQuantizeLinear`: its range is that of all tokens in a call, so parity holds up to rounding only."""
    step.assume(PER_CALL)
    step.flow.per_call.update(step.node.outputs)
    return [step.axes(0), (), ()]
