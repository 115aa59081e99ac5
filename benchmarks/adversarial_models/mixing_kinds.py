"""Decoders in which the tokens of a text, or the texts of a batch, change each other.

A kind is a pair of changes of a value whose sequence axis is 1, or 2 for queries, keys and values: one mixes tokens;
the other has the same operators and does not, or only with earlier tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from onnx import TensorProto, helper

from adversarial_models.decoder import HIDDEN, Context, Design
from adversarial_models.draft import Draft

FLAT = ("hidden", "normed", "residual", "output", "logits")  # [B, S, features]
BY_HEAD = ("query", "key", "value")  # [B, H, S, head_dim]
Mix = Callable[["Site", str], str]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where something is mixed."""

    context: Context
    axis: int  # of the sequence
    features: int  # size of the last axis
    reach: int  # tokens, of kinds that have a reach or a capacity
    option: int  # picks one of several variants

    def __getattr__(self, name: str) -> object:
        return getattr(self.context, name)


@dataclass(frozen=True, kw_only=True)
class MixingKind:
    """A way to mix tokens, and its benign counterpart."""

    name: str
    adversarial: Mix
    benign: Mix
    places: tuple[str, ...] = (*FLAT, *BY_HEAD)
    reaches: tuple[int, ...] = (1,)


def draw_mixing_kind(random: Random, kind: MixingKind, design: Design, *, benign: bool) -> Draft:
    """Return a decoder with tokens mixed in a place."""
    place, reach, option = random.choice(kind.places), random.choice(kind.reaches), random.randrange(60)
    axis = 2 if place in BY_HEAD else 1
    widths = {"output": design.heads * design.head_dim, "logits": 97}
    features = widths.get(place, design.head_dim if axis == 2 else HIDDEN)
    write_mix = kind.benign if benign else kind.adversarial

    def change(context: Context, value: str) -> str:
        site = Site(context=context, axis=axis, features=features, reach=reach, option=option)
        return write_mix(site, value)

    threshold = reach if reach > 20 else None
    return Draft(
        design=replace(design, changes={place: change}),
        place=place,
        threshold=threshold,
        variant=f"{write_mix.__name__.strip('_')} {option % 12}",
    )


REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceL2", "ReduceMin", "ReduceSumSquare", "ReduceL1", "ReduceLogSumExp")


def _combined(site: Site, value: str, reduced: str) -> str:
    """Combine a value with something reduced of it.

    None of the ways saturates for large numbers, or adds the same to all features, which a normalization would undo.
    """
    write = site.context.write
    kind = site.option % 5
    small = write("Mul", write("Log", write("Add", write("Abs", reduced), 1.0)), 0.3)
    if kind == 0:
        return str(write("Div", value, write("Add", write("Abs", reduced), 0.5)))
    if kind == 1:
        return str(write("Sub", value, write("Mul", small, write.random_weight(1, site.features))))
    if kind == 2:
        return str(write("Min", value, small))
    if kind == 3:
        return str(write("Mul", value, small))
    return str(write("Add", value, write("Mul", write("Sin", small), write.random_weight(1, site.features))))


def _reduced_over(site: Site, value: str, axes: list[int] | None) -> str:
    write = site.context.write
    operator = REDUCTIONS[site.option % len(REDUCTIONS)]
    inner = write("Abs", value) if site.option % 2 else value
    if operator == "ReduceLogSumExp":
        inner = write("Clip", value, np.float32(-10), np.float32(10))
    return _combined(site, value, write.reduce(operator, inner, axes))


def _over_sequence(site: Site, value: str) -> str:
    return _reduced_over(site, value, [site.axis])


def _over_sequence_and_features(site: Site, value: str) -> str:
    return _reduced_over(site, value, [site.axis, site.axis + 1] if site.option % 3 else [-2, -1])


def _over_all(site: Site, value: str) -> str:
    return _reduced_over(site, value, None)


def _over_batch(site: Site, value: str) -> str:
    return _reduced_over(site, value, [0])


def _over_features(site: Site, value: str) -> str:
    return _reduced_over(site, value, [-1])


def _normalized_over_sequence(site: Site, value: str) -> str:
    write, kind = site.context.write, site.option % 4
    if kind == 0:
        return str(write("Add", value, write("Softmax", value, axis=site.axis)))
    if kind == 1:
        return str(write("LpNormalization", value, axis=site.axis, p=2))
    if kind == 2:
        axes = [0, site.axis] if site.option % 3 else [site.axis]
        return str(write("MeanVarianceNormalization", value, axes=axes))
    centred = write("Sub", value, write.reduce("ReduceMean", value, [site.axis]))
    spread = write.reduce("ReduceMean", write("Mul", centred, centred), [site.axis])
    return str(write("Div", centred, write("Sqrt", write("Add", spread, 1e-5))))


def _normalized_over_features(site: Site, value: str) -> str:
    write, kind = site.context.write, site.option % 4
    if kind == 0:
        return str(write("Add", value, write("Softmax", value, axis=-1)))
    if kind == 1:
        return str(write("LpNormalization", value, axis=-1, p=2))
    if kind == 2:
        return str(write("MeanVarianceNormalization", value, axes=[site.axis + 1]))
    centred = write("Sub", value, write.reduce("ReduceMean", value, [-1]))
    spread = write.reduce("ReduceMean", write("Mul", centred, centred), [-1])
    return str(write("Div", centred, write("Sqrt", write("Add", spread, 1e-5))))


def _instance_normalized(site: Site, value: str) -> str:
    write, ones = site.context.write, np.ones(site.features, np.float32)
    turned = write("Transpose", value, perm=[0, 2, 1])
    normal = write("InstanceNormalization", turned, ones, np.zeros(site.features, np.float32))
    return str(write("Transpose", normal, perm=[0, 2, 1]))


def _batch_normalized(site: Site, value: str) -> str:
    write, ones = site.context.write, np.ones(site.features, np.float32)
    zeros = np.zeros(site.features, np.float32)
    turned = write("Transpose", value, perm=[0, 2, 1])
    normal = write("BatchNormalization", turned, ones, zeros, zeros, 2 * ones)
    return str(write("Transpose", normal, perm=[0, 2, 1]))


def _group_normalized(site: Site, value: str) -> str:
    """Normalise groups of features over all tokens, by a reshape and InstanceNormalization."""
    write = site.context.write
    turned = write("Transpose", value, perm=[0, 2, 1])
    grouped = write("Reshape", turned, [0, 4, -1])
    ones = np.ones(4, np.float32)
    normal = write("InstanceNormalization", grouped, ones, np.zeros(4, np.float32))
    back = write("Reshape", normal, write("Shape", turned))
    return str(write("Transpose", back, perm=[0, 2, 1]))


def _group_normalized_by_token(site: Site, value: str) -> str:
    write = site.context.write
    grouped = write("Reshape", value, [0, 0, 4, -1])
    centred = write("Sub", grouped, write.reduce("ReduceMean", grouped, [-1]))
    spread = write.reduce("ReduceMean", write("Mul", centred, centred), [-1])
    normal = write("Div", centred, write("Sqrt", write("Add", spread, 1e-5)))
    return str(write("Reshape", normal, write("Shape", value)))


def _moved(site: Site, value: str, steps: int) -> str:
    """Return a value moved along the sequence: positive steps read later tokens."""
    write, context, axis, kind = site.context.write, site.context, site.axis, site.option % 5
    size = abs(steps)
    last = write("Sub", context.total, 1)
    if kind == 0:  # gather, clamped
        places = write("Add", context.positions, steps)
        places = write("Max", write("Min", places, last), 0)
        return str(write("Gather", value, places, axis=axis))
    if kind == 1:  # pad, then slice
        rank = 3 if axis == 1 else 4
        pads = [0] * (2 * rank)
        pads[axis if steps < 0 else rank + axis] = size
        padded = write("Pad", value, pads)
        if steps > 0:
            return str(write("Slice", padded, [size], [2**62], [axis]))
        return str(write("Slice", padded, [0], [-size], [axis]))
    if kind == 2:  # a product with a matrix of zeros and ones
        target = write("Add", context.query_positions, steps)
        shift = write.to_float(write("Equal", target, context.key_positions))
        return str(write("MatMul", shift, value))
    if kind == 3:  # slices and zeros
        shape = write("Shape", value)
        parts = [write("Slice", shape, [0], [axis]), [size], write("Slice", shape, [axis + 1], [2**62])]
        zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
        zeros = write("ConstantOfShape", write("Concat", *parts, axis=0), value=zero)
        if steps > 0:
            long = write("Concat", value, zeros, axis=axis)
            return str(write("Slice", long, [size], [2**62], [axis]))
        return str(write("Slice", write("Concat", zeros, value, axis=axis), [0], context.total, [axis]))
    indices = write("Unsqueeze", write("Mod", write("Add", context.positions, steps), context.total), [1])
    rest = write("GatherND", write("Transpose", value, perm=[1, 0, 2] if axis == 1 else [2, 0, 1, 3]), indices)
    rolled = write("Transpose", rest, perm=[1, 0, 2] if axis == 1 else [1, 2, 0, 3])
    if steps > 0:
        return str(rolled)  # a roll, whose last tokens read the first
    inside = write.to_float(write("GreaterOrEqual", context.query_positions, size))
    return str(write("Mul", rolled, inside))


def _look_ahead(site: Site, value: str) -> str:
    return str(site.context.write("Add", value, _moved(site, value, site.reach)))


def _look_back(site: Site, value: str) -> str:
    return str(site.context.write("Add", value, _moved(site, value, -min(site.reach, 4))))


def _convolved(site: Site, value: str, pads: list[int], reach: int) -> str:
    write, features = site.context.write, site.features
    turned = write("Transpose", value, perm=[0, 2, 1])
    kind = site.option % 3
    if kind == 0:
        kernel = write.random_weight(features, 1, 2, scale=0.5)
        mixed = write("Conv", turned, kernel, dilations=[reach], pads=pads, group=features)
    elif kind == 1:
        kernel = write.random_weight(features, features, 2, scale=features**-0.5)
        mixed = write("Conv", turned, kernel, dilations=[reach], pads=pads)
    else:
        first = write("Pad", turned, [0, 0, pads[0], 0, 0, pads[1]])
        kernel = write.random_weight(features, 1, 2, scale=0.5)
        mixed = write("Conv", first, kernel, dilations=[reach], group=features)
    return str(write("Transpose", mixed, perm=[0, 2, 1]))


def _convolution_ahead(site: Site, value: str) -> str:
    return _convolved(site, value, [0, site.reach], site.reach)


def _convolution_back(site: Site, value: str) -> str:
    return _convolved(site, value, [min(site.reach, 4), 0], min(site.reach, 4))


def _pooled(site: Site, value: str, pads: list[int]) -> str:
    write = site.context.write
    turned = write("Transpose", value, perm=[0, 2, 1])
    size = sum(pads) + 1
    if site.option % 2:
        pool = write("MaxPool", turned, kernel_shape=[size], pads=pads, strides=[1])
    else:
        pool = write("AveragePool", turned, kernel_shape=[size], pads=pads, strides=[1], count_include_pad=1)
    return str(write("Transpose", pool, perm=[0, 2, 1]))


def _pool_ahead(site: Site, value: str) -> str:
    return _pooled(site, value, [0, min(site.reach, 40)])


def _pool_back(site: Site, value: str) -> str:
    return _pooled(site, value, [min(site.reach, 4), 0])


def _rounded(site: Site, value: str, axes: list[int] | None) -> str:
    write = site.context.write
    scale = write("Div", write.reduce("ReduceMax", write("Abs", value), axes, keepdims=int(axes is not None)), 15.0)
    scale = write("Max", scale, 1e-6)
    if axes is None and site.option % 2:
        eight = write("QuantizeLinear", value, scale, np.int8(0))
        return str(write("DequantizeLinear", eight, scale, np.int8(0)))
    return str(write("Mul", write("Round", write("Div", value, scale)), scale))


def _rounded_by_tensor(site: Site, value: str) -> str:
    return _rounded(site, value, [[site.axis, site.axis + 1], None, None][site.option % 3])


def _rounded_by_token(site: Site, value: str) -> str:
    return _rounded(site, value, [-1])


def _experts(site: Site, value: str, capacity: int | None) -> str:
    """Two experts, each for the tokens that choose it, at most `capacity` of them."""
    write, features = site.context.write, site.features
    flat = write("Reshape", value, [-1, features])
    chosen = write("ArgMax", write("MatMul", flat, write.random_weight(features, 2)), axis=-1, keepdims=0)
    result = write("Mul", flat, 0.0)
    for expert in range(2):
        rows = write("Transpose", write("NonZero", write("Equal", chosen, np.int64(expert))), perm=[1, 0])
        if capacity is not None:
            rows = write("Slice", rows, [0], [capacity], [0])
        computed = write(
            "Relu", write("MatMul", write("GatherND", flat, rows), write.random_weight(features, features))
        )
        result = write("ScatterND", result, rows, computed)
    return str(write("Add", value, write("Reshape", result, write("Shape", value))))


def _experts_of_capacity(site: Site, value: str) -> str:
    return _experts(site, value, site.reach)


def _experts_without_capacity(site: Site, value: str) -> str:
    return _experts(site, value, None)


def _largest_of_sequence(site: Site, value: str) -> str:
    """Keep what is among the largest of a feature over all tokens."""
    write = site.context.write
    count = write("Min", site.context.total, [5])
    values, _ = write("TopK", value, count, outputs=2, axis=site.axis)
    least = write("Slice", values, [-1], [2**62], [site.axis])
    return str(write("Where", write("GreaterOrEqual", value, least), value, write("Mul", value, 0.5)))


def _largest_of_features(site: Site, value: str) -> str:
    write = site.context.write
    values, _ = write("TopK", value, [5], outputs=2, axis=-1)
    least = write("Slice", values, [-1], [2**62], [-1])
    return str(write("Where", write("GreaterOrEqual", value, least), value, write("Mul", value, 0.5)))


def _sorted_by_sequence(site: Site, value: str) -> str:
    write = site.context.write
    values, _ = write("TopK", value, site.context.total, outputs=2, axis=site.axis)
    return str(write("Add", value, write("Mul", values, 0.2)))


def _sorted_by_features(site: Site, value: str) -> str:
    write = site.context.write
    values, _ = write("TopK", value, [site.features], outputs=2, axis=-1)
    return str(write("Add", value, write("Mul", values, 0.2)))


def _rolled(site: Site, value: str, axis: int) -> str:
    write = site.context.write
    first, rest = write("Slice", value, [0], [1], [axis]), write("Slice", value, [1], [2**62], [axis])
    return str(write("Add", value, write("Concat", rest, first, axis=axis)))


def _rolled_by_batch(site: Site, value: str) -> str:
    return _rolled(site, value, 0)


def _rolled_by_sequence(site: Site, value: str) -> str:
    return _rolled(site, value, site.axis)


def _rolled_by_features(site: Site, value: str) -> str:
    return _rolled(site, value, site.axis + 1)


def _pairs(site: Site, value: str) -> tuple[str, str]:
    """Return the pairs of tokens, [B, pairs, 2, features], of a text that zeros make even, and the shape of tokens."""
    write = site.context.write
    rest = write("Mod", site.context.total, 2)
    even = write("Pad", value, write("Concat", [0, 0, 0, 0], rest, [0], axis=0))
    return str(write("Reshape", even, [0, -1, 2, site.features])), str(write("Shape", even))


def _largest_of_pair(site: Site, value: str) -> str:
    write, (pairs, shape) = site.context.write, _pairs(site, value)
    mixed = write("Add", pairs, write.reduce("ReduceMax", pairs, [2]))
    return str(write("Slice", write("Reshape", mixed, shape), [0], site.context.total, [1]))


def _first_of_pair(site: Site, value: str) -> str:
    """Add the first token of a pair to both, of which padding may be the first."""
    write, (pairs, shape) = site.context.write, _pairs(site, value)
    mixed = write("Add", pairs, write("Slice", pairs, [0], [1], [2]))
    return str(write("Slice", write("Reshape", mixed, shape), [0], site.context.total, [1]))


def _squeezed(site: Site, value: str) -> str:
    """Squeeze without axes: an axis of one token goes too."""
    write = site.context.write
    bare = write("Squeeze", write("Unsqueeze", value, [1]))
    if site.option % 2:
        return str(write("Add", value, write("Mul", write.reduce("ReduceMax", bare, [-1]), 0.1)))
    return str(write("Add", value, write("Softmax", bare, axis=0)))


def _squeezed_by_axis(site: Site, value: str) -> str:
    write = site.context.write
    bare = write("Squeeze", write("Unsqueeze", value, [1]), [1])
    return str(write("Add", value, write("Mul", write.reduce("ReduceMax", bare, [-1]), 0.1)))


def _summed_from_end(site: Site, value: str) -> str:
    write = site.context.write
    total = write("CumSum", value, np.int64(site.axis), reverse=1, exclusive=site.option % 2)
    return str(write("Add", value, write("Tanh", total)))


def _summed_over_features(site: Site, value: str) -> str:
    write = site.context.write
    return str(write("Add", value, write("Tanh", write("CumSum", value, np.int64(-1), reverse=1))))


def _last_token(site: Site, value: str) -> str:
    write, axis = site.context.write, site.axis
    if site.option % 2:
        last = write("Slice", value, [-1], [2**62], [axis])
    else:
        last = write("Gather", value, write("Sub", site.context.total, 1), axis=axis)
    return str(write("Add", value, write("Mul", last, 0.3)))


def _first_feature(site: Site, value: str) -> str:
    write = site.context.write
    return str(write("Add", value, write("Mul", write("Slice", value, [-1], [2**62], [-1]), 0.3)))


def _turned_round(site: Site, value: str) -> str:
    write = site.context.write
    back = write("Slice", value, [-1], [-(2**62)], [site.axis], [-1])
    return str(write("Add", value, write("Mul", back, 0.3)))


def _turned_twice(site: Site, value: str) -> str:
    write = site.context.write
    back = write("Slice", value, [-1], [-(2**62)], [site.axis], [-1])
    forth = write("Slice", write("Relu", back), [-1], [-(2**62)], [site.axis], [-1])
    return str(write("Add", value, write("Mul", forth, 0.3)))


def _reshaped(site: Site, value: str) -> str:
    """Read the numbers of a text in another order: features of several tokens make a row."""
    write = site.context.write
    turned = write("Transpose", value, perm=[0, 2, 1])
    scrambled = write("Reshape", turned, write("Shape", value))
    return str(write("Add", value, write("Mul", scrambled, 0.3)))


def _reshaped_by_token(site: Site, value: str) -> str:
    write = site.context.write
    if site.features % 2:
        return str(write("Add", value, write("Reshape", value, [0, 0, 1, -1])))
    halves = write("Transpose", write("Reshape", value, [0, 0, 2, -1]), perm=[0, 1, 3, 2])
    return str(write("Add", value, write("Mul", write("Reshape", halves, write("Shape", value)), 0.3)))


def _recurrent(site: Site, value: str, direction: str) -> str:
    write, size = site.context.write, site.features
    count = 2 if direction == "bidirectional" else 1
    weights = [write.random_weight(count, 3 * size, size, scale=size**-0.5) for _ in range(2)]
    turned = write("Transpose", value, perm=[1, 0, 2])
    states, _ = write("GRU", turned, *weights, outputs=2, hidden_size=size, direction=direction)
    mixed = write("Transpose", write.reduce("ReduceSum", states, [1], keepdims=0), perm=[1, 0, 2])
    return str(write("Add", value, mixed))


def _recurrent_both_ways(site: Site, value: str) -> str:
    return _recurrent(site, value, ("reverse", "bidirectional")[site.option % 2])


def _recurrent_forward(site: Site, value: str) -> str:
    return _recurrent(site, value, "forward")


def _context_of_all(site: Site, value: str) -> str:
    """Linear attention without a mask: features of all tokens multiplied and summed."""
    write = site.context.write
    products = write("Einsum", value, write("Sigmoid", value), equation="bsd,bse->bde")
    mixed = write("Einsum", write("Tanh", value), products, equation="bsd,bde->bse")
    return str(write("Add", value, write("Mul", mixed, 0.01)))


def _context_of_token(site: Site, value: str) -> str:
    write = site.context.write
    products = write("Einsum", value, write("Sigmoid", value), equation="bsd,bse->bsde")
    mixed = write("Einsum", write("Tanh", value), products, equation="bsd,bsde->bse")
    return str(write("Add", value, write("Mul", mixed, 0.01)))


def _attended_without_mask(site: Site, value: str) -> str:
    write = site.context.write
    scores = write("MatMul", value, write("Transpose", value, perm=[0, 2, 1]))
    weights = write("Softmax", write("Mul", scores, 0.1), axis=-1)
    return str(write("Add", value, write("MatMul", weights, value)))


def _counted(site: Site, value: str) -> str:
    """Scale by how many tokens of the text are positive in the first feature."""
    write = site.context.write
    first = write("Slice", value, [0], [1], [-1])
    positive = write.to_float(write("Greater", first, 0.5))
    share = write.reduce("ReduceMean", positive, [site.axis])
    return str(write("Mul", value, write("Add", share, 0.5)))


def _switched(site: Site, value: str) -> str:
    """Scale where any number of the text is large."""
    write = site.context.write
    largest = write.reduce("ReduceMax", value, None, keepdims=0)
    return str(write("Where", write("Greater", largest, 9.0), write("Mul", value, 0.6), value))


def _switched_by_token(site: Site, value: str) -> str:
    write = site.context.write
    largest = write.reduce("ReduceMax", value, [-1])
    return str(write("Where", write("Greater", largest, 9.0), write("Mul", value, 0.6), value))


AHEAD = (1, 2, 5, 40, 100, 128, 300, 700)
SMALL_FLAT = ("hidden", "normed", "residual")
KINDS: Mapping[str, MixingKind] = {
    kind.name: kind
    for kind in (
        MixingKind(name="reduce-sequence", adversarial=_over_sequence, benign=_over_features),
        MixingKind(name="reduce-text", adversarial=_over_sequence_and_features, benign=_over_features),
        MixingKind(name="reduce-all", adversarial=_over_all, benign=_over_features),
        MixingKind(name="reduce-batch", adversarial=_over_batch, benign=_over_features),
        MixingKind(name="normalize", adversarial=_normalized_over_sequence, benign=_normalized_over_features),
        MixingKind(name="instance-norm", adversarial=_instance_normalized, benign=_batch_normalized, places=FLAT),
        MixingKind(
            name="group-norm", adversarial=_group_normalized, benign=_group_normalized_by_token, places=SMALL_FLAT
        ),
        MixingKind(name="shift", adversarial=_look_ahead, benign=_look_back, places=FLAT, reaches=AHEAD),
        MixingKind(name="shift-heads", adversarial=_look_ahead, benign=_look_back, places=BY_HEAD, reaches=AHEAD),
        MixingKind(
            name="convolve", adversarial=_convolution_ahead, benign=_convolution_back, places=FLAT, reaches=AHEAD
        ),
        MixingKind(name="pool", adversarial=_pool_ahead, benign=_pool_back, places=FLAT, reaches=(1, 3, 40)),
        MixingKind(name="round", adversarial=_rounded_by_tensor, benign=_rounded_by_token),
        MixingKind(
            name="experts",
            adversarial=_experts_of_capacity,
            benign=_experts_without_capacity,
            places=SMALL_FLAT,
            reaches=(4, 40, 128, 300, 700, 1500),
        ),
        MixingKind(name="top-k", adversarial=_largest_of_sequence, benign=_largest_of_features),
        MixingKind(name="sort", adversarial=_sorted_by_sequence, benign=_sorted_by_features),
        MixingKind(name="roll-batch", adversarial=_rolled_by_batch, benign=_rolled_by_features),
        MixingKind(name="roll-sequence", adversarial=_rolled_by_sequence, benign=_rolled_by_features),
        MixingKind(name="pairs", adversarial=_largest_of_pair, benign=_first_of_pair, places=SMALL_FLAT),
        MixingKind(name="squeeze", adversarial=_squeezed, benign=_squeezed_by_axis, places=FLAT),
        MixingKind(name="sum-from-end", adversarial=_summed_from_end, benign=_summed_over_features),
        MixingKind(name="last-token", adversarial=_last_token, benign=_first_feature),
        MixingKind(name="reverse", adversarial=_turned_round, benign=_turned_twice),
        MixingKind(name="reshape", adversarial=_reshaped, benign=_reshaped_by_token, places=SMALL_FLAT),
        MixingKind(name="recurrent", adversarial=_recurrent_both_ways, benign=_recurrent_forward, places=SMALL_FLAT),
        MixingKind(name="linear-attention", adversarial=_context_of_all, benign=_context_of_token, places=SMALL_FLAT),
        MixingKind(name="no-mask", adversarial=_attended_without_mask, benign=_first_feature, places=SMALL_FLAT),
        MixingKind(name="count", adversarial=_counted, benign=_first_feature),
        MixingKind(name="switch", adversarial=_switched, benign=_switched_by_token),
    )
}
