"""Decoders whose mask or bias depends on the total length, or lets a query read later keys.

A kind is a pair of functions: of an adversarial mask, and of a causal one of the same operators. Each takes the
context, the causal mask bool [S, T] and a threshold, and returns a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from onnx import TensorProto, helper

from adversarial_models.decoder import Context, Design
from adversarial_models.draft import Draft

Mask = Callable[[Context, str, int], str]


@dataclass(frozen=True, kw_only=True)
class MaskKind:
    """An adversarial mask and its benign counterpart."""

    name: str
    adversarial: Mask
    benign: Mask
    place: str = "allowed"
    thresholds: tuple[int, ...] = (40, 100, 200, 300, 700, 1000, 1700, 2600, 3300)


def draw_mask_kind(random: Random, kind: MaskKind, design: Design, *, benign: bool) -> Draft:
    """Return a decoder with a mask of a kind, or with that of its benign counterpart."""
    largest = 2100 if design.heads > 8 else 3600
    threshold = random.choice([one for one in kind.thresholds if one <= largest])
    write_mask = kind.benign if benign else kind.adversarial
    changes = {kind.place: lambda context, value: write_mask(context, value, threshold)}
    variant = write_mask.__name__.strip("_")
    return Draft(design=replace(design, changes=changes), place=kind.place, threshold=threshold, variant=variant)


def _grid(context: Context) -> tuple[str, str]:
    return context.query_positions, context.key_positions


def _ones(context: Context, kind: int = TensorProto.FLOAT) -> str:
    """Return ones [S, T]."""
    write, size = context.write, context.write("Shape", context.positions)
    one = helper.make_tensor("one", kind, [1], [1])
    return str(write("ConstantOfShape", write("Concat", size, size, axis=0), value=one))


def _window_from_end(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    near = write("GreaterOrEqual", keys, write("Sub", context.total, at))
    return str(write("And", causal, write("Or", near, write("Equal", keys, queries))))


def _window_from_end_of_floats(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    after = write("Add", write.to_float(keys), float(at))
    near = write("Not", write("Less", after, write.to_float(context.total)))
    return str(write("And", causal, write("Or", near, write("Equal", keys, queries))))


def _window(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    return str(write("And", causal, write("Greater", keys, write("Sub", queries, at))))


def _window_and_sinks(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    near = write("Or", write("Greater", keys, write("Sub", queries, at)), write("Less", keys, 4))
    return str(write("And", causal, near))


def _segment(context: Context, causal: str, at: int) -> str:
    """Let positions from the threshold on, 60 of them, read each other."""
    write, place = context.write, context.positions
    inside = write("And", write("GreaterOrEqual", place, [at]), write("Less", place, [at + 60]))
    both = write("And", write("Unsqueeze", inside, [0]), write("Unsqueeze", inside, [1]))
    return str(write("Or", causal, both))


def _segment_apart(context: Context, causal: str, at: int) -> str:
    write, place = context.write, context.positions
    inside = write("And", write("GreaterOrEqual", place, [at]), write("Less", place, [at + 60]))
    same = write(
        "Equal",
        write("Cast", write("Unsqueeze", inside, [0]), to=7),
        write("Cast", write("Unsqueeze", inside, [1]), to=7),
    )
    return str(write("And", causal, write("Or", same, write("Equal", context.key_positions, [0]))))


def _prefix(context: Context, causal: str, at: int) -> str:
    write, (_, keys) = context.write, _grid(context)
    return str(write("Or", causal, write("Less", keys, min(at, 30))))


def _blocks(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    return str(write("LessOrEqual", write("Div", keys, at), write("Div", queries, at)))


def _causal_blocks(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    return str(write("And", causal, write("Equal", write("Div", keys, at), write("Div", queries, at))))


def _late_blocks(context: Context, causal: str, at: int) -> str:
    """Let pairs of tokens read each other beyond the threshold."""
    write, (queries, keys) = context.write, _grid(context)
    pairs = write("Equal", write("Div", keys, 2), write("Div", queries, 2))
    return str(write("Or", causal, write("And", pairs, write("GreaterOrEqual", queries, at))))


def _look_ahead(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    return str(write("Or", causal, write("Equal", keys, write("Add", queries, at))))


def _look_ahead_late(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    ahead = write("Cast", write("Greater", queries, at), to=7)
    return str(write("LessOrEqual", keys, write("Add", queries, ahead)))


def _look_ahead_once(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    one = write("And", write("Equal", queries, at), write("Equal", keys, at + 5))
    return str(write("Or", causal, one))


def _look_back(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    far = write("Equal", keys, write("Sub", queries, at))
    return str(write("And", causal, write("Or", far, write("Less", write("Sub", queries, keys), 20))))


def _diagonal_of_length(context: Context, causal: str, at: int) -> str:
    write = context.write
    diagonal = write("Squeeze", write("Div", context.total, at))
    return str(write("Cast", write("Trilu", _ones(context), diagonal, upper=0), to=TensorProto.BOOL))


def _two_diagonals(context: Context, causal: str, at: int) -> str:
    write = context.write
    lower = write("Trilu", _ones(context), np.int64(0), upper=0)
    both = write("Trilu", lower, np.int64(-at), upper=1)
    return str(write("And", causal, write("Cast", both, to=TensorProto.BOOL)))


def _reversed_sum(context: Context, causal: str, at: int) -> str:
    """Close keys that are more than the threshold before the end, by a sum from the end."""
    write = context.write
    ones = write.to_int(write("GreaterOrEqual", context.positions, 0))
    left = write("CumSum", ones, 0, reverse=1)
    near = write("Unsqueeze", write("LessOrEqual", left, at), [0])
    return str(write("And", causal, write("Or", near, write("Equal", *_grid(context)))))


def _forward_sum(context: Context, causal: str, at: int) -> str:
    write = context.write
    ones = write.to_int(write("GreaterOrEqual", context.positions, 0))
    so_far = write("CumSum", ones, 0)
    near = write("Unsqueeze", write("LessOrEqual", so_far, at), [0])
    return str(write("And", causal, write("Or", near, write("Equal", *_grid(context)))))


def _range_from_end(context: Context, causal: str, at: int) -> str:
    write = context.write
    last = write("Sub", write("Squeeze", context.total), 1)
    left = write("Range", last, -1, -1)
    near = write("Unsqueeze", write("Less", left, at), [0])
    return str(write("And", causal, write("Or", near, write("Equal", *_grid(context)))))


def _distances_from_end(context: Context, causal: str, at: int) -> str:
    """A window whose distances are differences of positions counted from the end."""
    write = context.write
    last = write("Sub", write("Squeeze", context.total), 1)
    left = write("Range", last, -1, -1)
    distances = write("Sub", write("Unsqueeze", left, [0]), write("Unsqueeze", left, [1]))
    return str(write("And", causal, write("Less", distances, at)))


def _closed_key_from_end(context: Context, causal: str, at: int) -> str:
    """Close a key that is a fixed number before the end, written by ScatterND."""
    write = context.write
    spot = write("Unsqueeze", write("Max", write("Sub", context.total, min(at, 60)), [0]), [0])
    open_keys = write("Cast", write("GreaterOrEqual", context.positions, 0), to=TensorProto.FLOAT)
    written = write("ScatterND", open_keys, spot, np.zeros(1, np.float32))
    near = write("Cast", write("Unsqueeze", written, [0]), to=TensorProto.BOOL)
    return str(write("And", causal, write("Or", near, write("Equal", *_grid(context)))))


def _closed_first_key(context: Context, causal: str, at: int) -> str:
    write = context.write
    open_keys = write("Cast", write("GreaterOrEqual", context.positions, 0), to=TensorProto.FLOAT)
    written = write("ScatterND", open_keys, np.array([[0]]), np.zeros(1, np.float32))
    near = write("Cast", write("Unsqueeze", written, [0]), to=TensorProto.BOOL)
    return str(write("And", causal, write("Or", near, write("Equal", *_grid(context)))))


def _stride_of_length(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    stride = write("Add", write("Div", context.total, at), 1)
    hit = write("Equal", write("Mod", write("Sub", queries, keys), stride), 0)
    return str(write("And", causal, hit))


def _stride(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    hit = write("Equal", write("Mod", write("Sub", queries, keys), 3), 0)
    return str(write("And", causal, hit))


def _closed_middle(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    middle = write("Equal", keys, write("Div", context.total, 2))
    return str(write("And", causal, write("Or", write("Not", middle), write("Equal", keys, queries))))


def _closed_place(context: Context, causal: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    place = write("Equal", keys, at)
    return str(write("And", causal, write("Or", write("Not", place), write("Equal", keys, queries))))


def _ends_of_range(context: Context, causal: str, at: int) -> str:
    """Close the first half of the keys beyond the threshold, by a slice that is padded."""
    write = context.write
    size = write("Max", write("Sub", context.total, at), [0])
    closed = write("Expand", np.array([0]), size)
    rest = write("Expand", np.array([1]), write("Sub", context.total, size))
    near = write("Cast", write("Unsqueeze", write("Concat", closed, rest, axis=0), [0]), to=TensorProto.BOOL)
    return str(write("And", causal, write("Or", near, write("Equal", *_grid(context)))))


def _starts_of_range(context: Context, causal: str, at: int) -> str:
    """Close keys from the threshold on, by a slice that is padded."""
    write = context.write
    size = write("Min", context.total, [at])
    opened = write("Expand", np.array([1]), size)
    rest = write("Expand", np.array([0]), write("Sub", context.total, size))
    near = write("Cast", write("Unsqueeze", write("Concat", opened, rest, axis=0), [0]), to=TensorProto.BOOL)
    return str(write("And", causal, write("Or", near, write("Equal", *_grid(context)))))


# biases, float [.., S, T]


def _bias_of_rest(context: Context, bias: str, at: int) -> str:
    """A bias by the distance of a key from the end, flat beyond 20 to 60 tokens."""
    write = context.write
    left = write("Sub", write("Sub", context.total, 1), context.key_positions)
    flat = write("Min", left, 20 + at % 41)
    return str(write("Add", bias, write("Mul", write.to_float(flat), -0.05)))


def _bias_of_square_of_rest(context: Context, bias: str, at: int) -> str:
    """A bias by the square of the distance from the end: the softmax notices the end."""
    write = context.write
    left = write.to_float(write("Sub", context.total, context.key_positions))
    return str(write("Add", bias, write("Mul", write("Mul", left, left), -1e-4)))


def _bias_of_distance(context: Context, bias: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    distance = write("Max", write("Sub", queries, keys), 0)
    return str(write("Add", bias, write("Mul", write.to_float(write("Min", distance, at)), -0.05)))


def _bias_linear_in_rest(context: Context, bias: str, at: int) -> str:
    """A bias that is linear in the distance from the end: the softmax does not notice the end."""
    write = context.write
    left = write("Sub", write("Sub", context.total, 1), context.key_positions)
    return str(write("Add", bias, write("Mul", write.to_float(left), -0.02)))


def _bias_of_share(context: Context, bias: str, at: int) -> str:
    """A bias by buckets of distance over the total length."""
    write, (queries, keys) = context.write, _grid(context)
    share = write("Div", write("Mul", write("Sub", queries, keys), 16), context.total)
    bucket = write("Max", write("Min", share, 15), 0)
    return str(write("Add", bias, write("Gather", write.random_weight(16, scale=1.0), bucket)))


def _bias_of_bucket(context: Context, bias: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    bucket = write("Max", write("Min", write("Sub", queries, keys), 15), 0)
    return str(write("Add", bias, write("Gather", write.random_weight(16, scale=1.0), bucket)))


def _bias_table_by_rest(context: Context, bias: str, at: int) -> str:
    """A table of biases whose middle is found by the total length."""
    write, (queries, keys) = context.write, _grid(context)
    place = write("Add", write("Sub", queries, keys), write("Sub", context.total, 1))
    table = write.random_weight(8500, scale=1.0)
    return str(write("Add", bias, write("Gather", table, write("Min", place, 8499))))


def _bias_table_by_middle(context: Context, bias: str, at: int) -> str:
    write, (queries, keys) = context.write, _grid(context)
    place = write("Add", write("Sub", queries, keys), 4250)
    return str(write("Add", bias, write("Gather", write.random_weight(8500, scale=1.0), place)))


def _bias_of_logarithm(context: Context, bias: str, at: int) -> str:
    write = context.write
    left = write.to_float(write("Sub", context.total, context.key_positions))
    return str(write("Sub", bias, write("Log", left)))


def _bias_of_own_logarithm(context: Context, bias: str, at: int) -> str:
    write = context.write
    place = write.to_float(write("Add", context.key_positions, 1))
    return str(write("Sub", bias, write("Log", place)))


def _between(context: Context, at: int) -> str:
    """Return which positions are among 60 from the threshold on, bool [S], without comparing with a number."""
    write = context.write
    places = write.to_float(context.positions)
    after, beyond = (
        write("Cast", write("Relu", write("Add", places, 0.5 - start)), to=TensorProto.BOOL) for start in (at, at + 60)
    )
    return str(write("And", after, write("Not", beyond)))


def _both(context: Context, inside: str) -> str:
    write = context.write
    return str(write("And", write("Unsqueeze", inside, [1]), write("Unsqueeze", inside, [0])))


def _hidden_segment(context: Context, causal: str, at: int) -> str:
    return str(context.write("Or", causal, _both(context, _between(context, at))))


def _hidden_segment_apart(context: Context, causal: str, at: int) -> str:
    write = context.write
    apart = write("Not", write("Xor", *(write("Unsqueeze", _between(context, at), [axis]) for axis in (0, 1))))
    return str(write("And", causal, write("Or", apart, write("Equal", context.key_positions, [0]))))


def _numbered(context: Context, at: int) -> str:
    """Return numbers of segments from a table, [S]: 1 for 60 positions from the threshold on, 0 for others."""
    table = np.zeros(4200, np.int64)
    table[at : at + 60] = 1
    return str(context.write("Gather", context.write.weight(table), context.positions))


def _segment_of_table(context: Context, causal: str, at: int) -> str:
    inside = context.write("Greater", _numbered(context, at), 0)
    return str(context.write("Or", causal, _both(context, inside)))


def _segment_of_table_apart(context: Context, causal: str, at: int) -> str:
    write, numbers = context.write, _numbered(context, at)
    same = write("Equal", write("Unsqueeze", numbers, [0]), write("Unsqueeze", numbers, [1]))
    return str(write("And", causal, write("Or", same, write("Equal", context.key_positions, [0]))))


def _rounded(context: Context, causal: str, at: int) -> str:
    """Compare positions in 16 bits, which do not tell apart neighbors beyond 2048 or, as bfloat16, 256."""
    write = context.write
    narrow = TensorProto.FLOAT16 if at == 2048 else TensorProto.BFLOAT16
    queries, keys = (write.to_float(write("Cast", one, to=narrow)) for one in _grid(context))
    return str(write("LessOrEqual", keys, queries))


def _rounded_and_causal(context: Context, causal: str, at: int) -> str:
    return str(context.write("And", causal, _rounded(context, causal, at)))


def _overflowing(context: Context, causal: str, at: int) -> str:
    """Compare positions as integers that wrap around: products of int64, or bytes."""
    write = context.write
    if at == 255:
        queries, keys = (write.to_int(write("Cast", one, to=TensorProto.UINT8)) for one in _grid(context))
    else:
        queries, keys = (write("Mul", one, np.int64(1 << 53)) for one in _grid(context))
    return str(write("LessOrEqual", keys, queries))


def _overflowing_and_causal(context: Context, causal: str, at: int) -> str:
    return str(context.write("And", causal, _overflowing(context, causal, at)))


def _third_sequence(context: Context, causal: str, at: int) -> str:
    """Let the third sequence of a batch read the next two keys."""
    write, (queries, keys) = context.write, _grid(context)
    numbers = write("Range", 0, write("Squeeze", write("Shape", "input_ids", start=0, end=1)), 1)
    near = write("Less", keys, write("Add", queries, 3))
    return str(write("Or", causal, write("And", write("Unsqueeze", write("Greater", numbers, 1), [1, 2, 3]), near)))


def _third_sequence_causal(context: Context, causal: str, at: int) -> str:
    return str(context.write("And", causal, _third_sequence(context, causal, at)))


def _bias_table_open(context: Context, bias: str, at: int) -> str:
    """A table of biases by distance in which one distance ahead is more than the mask takes away."""
    return _bias_by_distance(context, bias, at, 30000.0)


def _bias_table_closed(context: Context, bias: str, at: int) -> str:
    return _bias_by_distance(context, bias, at, 1.0)


def _bias_by_distance(context: Context, bias: str, at: int, number: float) -> str:
    write, (queries, keys) = context.write, _grid(context)
    table = write.noise.standard_normal(8500).astype(np.float32)
    table[4250 + at] = number
    place = write("Add", write("Sub", keys, queries), 4250)
    return str(write("Add", bias, write("Gather", write.weight(table), place)))


KINDS: Mapping[str, MaskKind] = {
    kind.name: kind
    for kind in (
        MaskKind(name="window-from-end", adversarial=_window_from_end, benign=_window),
        MaskKind(name="window-from-end-float", adversarial=_window_from_end_of_floats, benign=_window_and_sinks),
        MaskKind(name="segment", adversarial=_segment, benign=_segment_apart),
        MaskKind(name="prefix", adversarial=_prefix, benign=_window_and_sinks),
        MaskKind(name="blocks", adversarial=_blocks, benign=_causal_blocks, thresholds=(2, 7, 64, 300, 1000)),
        MaskKind(name="late-blocks", adversarial=_late_blocks, benign=_causal_blocks),
        MaskKind(name="look-ahead", adversarial=_look_ahead, benign=_look_back, thresholds=(1, 5, 40, 128, 600, 1500)),
        MaskKind(name="look-ahead-late", adversarial=_look_ahead_late, benign=_look_back),
        MaskKind(name="look-ahead-once", adversarial=_look_ahead_once, benign=_closed_place),
        MaskKind(name="hidden-segment", adversarial=_hidden_segment, benign=_hidden_segment_apart),
        MaskKind(name="segment-of-table", adversarial=_segment_of_table, benign=_segment_of_table_apart),
        MaskKind(name="half-precision", adversarial=_rounded, benign=_rounded_and_causal, thresholds=(2048, 256)),
        MaskKind(name="overflow", adversarial=_overflowing, benign=_overflowing_and_causal, thresholds=(1023, 255)),
        MaskKind(name="third-sequence", adversarial=_third_sequence, benign=_third_sequence_causal, thresholds=(2,)),
        MaskKind(name="bias-table-open", adversarial=_bias_table_open, benign=_bias_table_closed, place="bias"),
        MaskKind(name="trilu-of-length", adversarial=_diagonal_of_length, benign=_two_diagonals),
        MaskKind(name="reversed-sum", adversarial=_reversed_sum, benign=_forward_sum),
        MaskKind(name="range-from-end", adversarial=_range_from_end, benign=_distances_from_end),
        MaskKind(name="scatter-from-end", adversarial=_closed_key_from_end, benign=_closed_first_key),
        MaskKind(name="stride-of-length", adversarial=_stride_of_length, benign=_stride),
        MaskKind(name="middle", adversarial=_closed_middle, benign=_closed_place),
        MaskKind(name="padded-range", adversarial=_ends_of_range, benign=_starts_of_range),
        MaskKind(name="bias-of-rest", adversarial=_bias_of_rest, benign=_bias_of_distance, place="bias"),
        MaskKind(name="bias-of-share", adversarial=_bias_of_share, benign=_bias_of_bucket, place="bias"),
        MaskKind(name="bias-table", adversarial=_bias_table_by_rest, benign=_bias_table_by_middle, place="bias"),
        MaskKind(name="bias-logarithm", adversarial=_bias_of_logarithm, benign=_bias_of_own_logarithm, place="bias"),
        MaskKind(name="bias-linear", adversarial=_bias_of_square_of_rest, benign=_bias_linear_in_rest, place="bias"),
    )
}
