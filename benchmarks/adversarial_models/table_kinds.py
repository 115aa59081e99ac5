"""Decoders with masks, positions and rotary settings stored as tables, inside the file or outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from onnx import TensorProto

from adversarial_models.decoder import HIDDEN, Change, Context, Design
from adversarial_models.draft import Draft


@dataclass(frozen=True, kw_only=True)
class TableKind:
    """A table and how it is read."""

    name: str
    make: Callable[[Random, int, bool], tuple[str, Change]]  # place and change
    thresholds: tuple[int, ...] = (40, 200, 700, 1023, 1500, 2300, 3000)


def draw_table_kind(random: Random, kind: TableKind, design: Design, *, benign: bool) -> Draft:
    """Return a decoder that reads a table of a kind."""
    threshold = random.choice(kind.thresholds)
    if threshold > 2100 or kind.name == "bias-one-head":
        design = replace(design, heads=4, kv_heads=4, masking="add")
    place, change = kind.make(random, threshold, not benign)
    design = replace(design, changes={place: change})
    if place == "positions":
        design = replace(design, positions="learned")
    if place == "angles":
        design = replace(design, positions="rotary")
    return Draft(design=design, place=place, threshold=threshold, variant=kind.name)


def _triangle(size: int) -> np.ndarray:
    return np.tril(np.ones((size, size), np.bool_))


def _mask_table(random: Random, size: int, at: int, fault: Callable[[np.ndarray, int], None] | None) -> Change:
    """A mask as a table, of one of several types, sliced to the length in one of several ways."""
    stored = random.choice(["bool", "float", "uint8", "negative"])
    outside = random.random() < 0.5
    slicing = random.choice(["both", "rows-then-columns", "gather", "from-zero-4d"])
    table = _triangle(size)
    if fault:
        fault(table, at)

    def change(context: Context, causal: str) -> str:
        write = context.write
        if stored == "negative":
            array = np.where(table, 0, -1e4).astype(np.float32)
        else:
            array = table.astype({"bool": np.bool_, "float": np.float32, "uint8": np.uint8}[stored])
        name = write.weight(array[None, None] if slicing == "from-zero-4d" else array, outside=outside)
        length = context.total
        if slicing == "both":
            part = write("Slice", name, [0, 0], write("Concat", length, length, axis=0), [0, 1])
        elif slicing == "rows-then-columns":
            part = write("Slice", write("Slice", name, [0], length, [0]), [0], length, [1])
        elif slicing == "gather":
            part = write("Gather", write("Gather", name, context.positions, axis=0), context.positions, axis=1)
        else:
            part = write("Slice", write("Slice", name, [0], length, [2]), [0], length, [3])
        if stored == "negative":
            return str(write("Greater", part, -1.0))
        return str(part if stored == "bool" else write("Cast", part, to=TensorProto.BOOL))

    return change


def _hole(table: np.ndarray, at: int) -> None:
    table[at : at + 20, at + 20 : at + 24] = True


def _open_block(table: np.ndarray, at: int) -> None:
    table[at : at + 30, at : at + 30] = True


def _open_corner(table: np.ndarray, at: int) -> None:
    table[-50:, -50:] = True


def _window(table: np.ndarray, at: int) -> None:
    places = np.arange(len(table))
    table &= places[:, None] - places[None] < at


def _mask(
    size: int, adversarial: Callable[[np.ndarray, int], None]
) -> Callable[[Random, int, bool], tuple[str, Change]]:
    def make(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
        fault = adversarial if is_adversarial else random.choice([None, _window])
        return "allowed", _mask_table(random, size, at, fault)

    return make


def _mask_from_end(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    """A mask sliced from the end of a table: right if all its diagonals are constant."""
    outside = random.random() < 0.5
    size = 4100

    def change(context: Context, causal: str) -> str:
        write = context.write
        table = _triangle(size)
        if is_adversarial:
            table[:, : size - at] = False  # keys more than the threshold before the end
            np.fill_diagonal(table, True)
        name = write.weight(table, outside=outside)
        start = write("Sub", size, context.total)
        both = write("Concat", start, start, axis=0)
        return str(write("Slice", name, both, [size, size], [0, 1]))

    return "allowed", change


def _one_head(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    """A bias of each head as a table, with an opening in the last head."""
    outside = random.random() < 0.5
    size = {40: 512, 200: 512, 700: 1024}.get(at, 2400)
    at = min(at, size - 10)

    def change(context: Context, bias: str) -> str:
        write = context.write
        table = np.zeros((4, size, size), np.float32)
        table[3, at, :at] = 3.0
        if is_adversarial:
            table[3, at, at + 3] = 20000.0  # more than the mask takes away
        name = write.weight(table, outside=outside)
        length = context.total
        part = write("Slice", name, [0, 0], write("Concat", length, length, axis=0), [1, 2])
        return str(write("Add", bias, part))

    return "bias", change


def _places_from_end(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    def change(context: Context, positions: str) -> str:
        write = context.write
        if is_adversarial:
            return str(write("Sub", write("Sub", context.total, 1), positions))
        return str(write("Add", write("Mul", positions, 1), 2))

    return "positions", change


def _places_shifted(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    """Positions moved by what the text has beyond a threshold."""

    def change(context: Context, positions: str) -> str:
        write = context.write
        if is_adversarial:
            over = write("Max", write("Sub", context.total, at), [0])
            return str(write("Max", write("Sub", positions, over), 0))
        return str(write("Max", write("Sub", positions, at), 0))

    return "positions", change


def _places_clamped(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    """Positions clamped to a threshold, or scaled so that the text fits below it."""

    def change(context: Context, positions: str) -> str:
        write = context.write
        if is_adversarial:
            longest = write("Max", context.total, [at])
            return str(write("Div", write("Mul", positions, at), longest))
        return str(write("Min", positions, at))

    return "positions", change


def _rows_from_end(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    """A table of positions whose last rows are added, or its first."""
    outside = random.random() < 0.5

    def change(context: Context, hidden: str) -> str:
        write = context.write
        table = write.noise.standard_normal((4100, HIDDEN)).astype(np.float32)
        name = write.weight(table, outside=outside)
        if is_adversarial:
            rows = write("Slice", name, write("Sub", 4100, context.total), [4100], [0])
        else:
            rows = write("Slice", name, [0], context.total, [0])
        return str(write("Add", hidden, write("Unsqueeze", rows, [0])))

    return "hidden", change


def _rows_by_length(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    """A row of a table found by the length, or by each position: clamped, by blocks."""
    outside = random.random() < 0.5

    def change(context: Context, hidden: str) -> str:
        write = context.write
        table = write.noise.standard_normal((6, HIDDEN)).astype(np.float32)
        name = write.weight(table, outside=outside)
        length = context.total if is_adversarial else context.positions
        row = write("Min", write("Div", length, at), np.array([5]))
        return str(write("Add", hidden, write("Gather", name, row)))

    return "hidden", change


def _angle_table(random: Random, at: int, is_adversarial: bool) -> tuple[str, Change]:
    """Angles read from one of two tables: short and long factors."""
    outside = random.random() < 0.5

    def change(context: Context, angles: str) -> str:
        write = context.write
        factors = write.weight(np.array([[1.0], [0.5]], np.float32), outside=outside)
        chosen = context.total if is_adversarial else context.query_positions
        which = write.to_int(write("Greater", chosen, at))
        return str(
            write("Mul", angles, write("Squeeze", write("Gather", factors, which), [0] if is_adversarial else [1]))
        )

    return "angles", change


SMALL, WIDE, HUGE = 4096, 4001, 4200  # 4096 ** 2 is 2 ** 24
KINDS: Mapping[str, TableKind] = {
    kind.name: kind
    for kind in (
        TableKind(name="mask-hole", make=_mask(SMALL, _hole)),
        TableKind(name="mask-hole-huge", make=_mask(HUGE, _hole)),
        TableKind(name="mask-block", make=_mask(WIDE, _open_block)),
        TableKind(name="mask-corner", make=_mask(WIDE, _open_corner), thresholds=(3951,)),
        TableKind(name="mask-from-end", make=_mask_from_end),
        TableKind(name="bias-one-head", make=_one_head),
        TableKind(name="places-from-end", make=_places_from_end, thresholds=(2,)),
        TableKind(name="places-shifted", make=_places_shifted),
        TableKind(name="places-clamped", make=_places_clamped),
        TableKind(name="rows-from-end", make=_rows_from_end, thresholds=(2,)),
        TableKind(name="rows-by-length", make=_rows_by_length),
        TableKind(name="angle-factors", make=_angle_table),
    )
}
