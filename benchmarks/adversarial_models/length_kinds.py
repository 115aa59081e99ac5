"""Decoders that scale, bias, shift or mask by a function of the total length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import numpy as np

from adversarial_models.decoder import HIDDEN, Change, Context, Design
from adversarial_models.draft import Draft
from adversarial_models.length_functions import FUNCTIONS, LengthFunction

SCALED = ("scores", "query", "key", "value", "output", "residual", "normed", "logits", "hidden")
LENGTH_PLACES = (*SCALED, "shift", "positions", "angles", "window", "bias")
THRESHOLDS = (40, 70, 100, 130, 200, 300, 511, 700, 1000, 1500, 2000, 2048, 2600, 3000, 3500)


def draw_length_kind(random: Random, function: LengthFunction, design: Design, *, benign: bool) -> Draft:
    """Return a decoder that a function of the total length changes, or, if benign, a function of each position."""
    place = random.choice(LENGTH_PLACES)
    largest = 2100 if design.heads > 8 else 3600
    threshold = random.choice([one for one in THRESHOLDS if one <= largest])
    if function.threshold is not None:
        threshold = function.threshold
    layers = random.choice([(0, 1), (0, 1), (0,)])
    benign_means = ["beyond", "no-effect"] if function.scalar else ["per-token", "per-token", "beyond", "no-effect"]
    means = random.choice(benign_means)
    if not benign:
        means = "total"
    if means == "beyond" and (function.threshold is not None or threshold < 200 or function.name == "multiples"):
        means = "no-effect"
    design = _with_place(design, place, layers, rows=threshold - 7 if means == "beyond" else None)
    change = _change(place, function, threshold, means)
    where = {"shift": "hidden", "window": "allowed"}.get(place, place)
    design = replace(design, changes={where: change})
    return Draft(design=design, place=place, threshold=threshold, variant=f"{function.name} {means}")


def _with_place(design: Design, place: str, layers: tuple[int, ...], rows: int | None) -> Design:
    design = replace(design, layers_changed=layers)
    if place == "angles" and design.positions not in ("rotary", "sinusoidal"):
        design = replace(design, positions="rotary")
    if place == "positions" and design.positions == "alibi":
        design = replace(design, positions="learned")
    if rows:
        design = replace(design, positions="learned", rows=rows)
    return design


def _change(place: str, function: LengthFunction, threshold: int, means: str) -> Change:
    def amount(context: Context) -> str:
        write = context.write
        length = context.total
        if means == "per-token":
            length = write("Add", context.query_positions, 1)  # [S, 1]
        number = function.write(write, length, threshold)
        return str(write("Mul", number, 0.0) if means == "no-effect" else number)

    def change(context: Context, value: str) -> str:
        return APPLIED.get(place, _scale)(context, value, amount(context))

    return change


def _factor(context: Context, amount: str, strength: float) -> str:
    return str(context.write("Add", context.write("Mul", amount, strength), 1.0))


def _scale(context: Context, value: str, amount: str) -> str:
    return str(context.write("Mul", value, _factor(context, amount, 0.4)))


def _shift(context: Context, value: str, amount: str) -> str:
    write = context.write
    return str(write("Add", value, write("Mul", amount, write.random_weight(1, HIDDEN))))


def _move(context: Context, value: str, amount: str) -> str:
    write = context.write
    steps = write("Cast", write("Ceil", write("Clip", amount, np.float32(0), np.float32(5))), to=7)
    return str(write("Add", value, write("Reshape", steps, [-1])))


def _turn(context: Context, value: str, amount: str) -> str:
    return str(context.write("Div", value, _factor(context, amount, 0.5)))


def _narrow(context: Context, value: str, amount: str) -> str:
    """Let a query read a smaller window where the amount is positive."""
    write = context.write
    narrow = write("Greater", amount, 1e-3)
    window = write("Where", narrow, np.array([9]), np.array([100000]))
    distances = write("Sub", context.query_positions, context.key_positions)
    return str(write("And", value, write("Less", distances, window)))


def _lean(context: Context, value: str, amount: str) -> str:
    """Add a bias by distance, with a slope that grows with the amount."""
    write = context.write
    distances = write.to_float(write("Sub", context.key_positions, context.query_positions))
    slope = write("Mul", _factor(context, amount, 1.0), 0.05)
    return str(write("Add", value, write("Mul", distances, slope)))


APPLIED: Mapping[str, object] = {
    "shift": _shift,
    "positions": _move,
    "angles": _turn,
    "window": _narrow,
    "bias": _lean,
}  # type: ignore[assignment]

__all__ = ["FUNCTIONS", "draw_length_kind"]
