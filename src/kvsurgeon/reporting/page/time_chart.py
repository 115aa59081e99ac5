"""A chart of the time per token, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 260, 52, 40, 12  # units of the chart
_TICKS = 4


def time_chart(series: Mapping[str, Sequence[float]]) -> Markup:
    """Return a chart of milliseconds per token, with a line for each series of seconds."""
    longest = max(len(seconds) for seconds in series.values())
    step = _round_step(1000 * max(max(seconds) for seconds in series.values()) / _TICKS)
    top = step * _TICKS
    inner = _HEIGHT - _BOTTOM - _TOP

    def place(index: int, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 8) * index / max(longest - 1, 1)
        return f"{x:.1f},{_TOP + inner * (1 - value / top):.1f}"

    ticks = Markup("").join(
        Markup('<path class="rule" d="M{} {y:.1f}H{}"/><text class="end" x="{}" y="{label:.1f}">{:g}</text>').format(
            _LEFT, _WIDTH - 8, _LEFT - 8, step * tick, y=_TOP + inner * (1 - tick / _TICKS),
            label=_TOP + inner * (1 - tick / _TICKS) + 4,
        )
        for tick in range(_TICKS + 1)
    )  # fmt: skip
    lines = Markup("").join(
        Markup('<polyline class="series{}" points="{}"><title>{}</title></polyline>').format(
            number, " ".join(place(index, 1000 * value) for index, value in enumerate(seconds)), name
        )
        for number, (name, seconds) in enumerate(series.items())
    )
    labels = Markup(
        '<text x="{}" y="{}">1</text><text class="end" x="{}" y="{}">{}</text><text class="middle" x="{}" y="{}">'
        "generated token</text>"
    ).format(_LEFT, _HEIGHT - 22, _WIDTH - 8, _HEIGHT - 22, longest, (_LEFT + _WIDTH) / 2, _HEIGHT - 6)
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}{}</svg>').format(
        _WIDTH, _HEIGHT, "milliseconds of each generated token", ticks, lines, labels
    )


def _round_step(least: float) -> float:
    """Return the first of 1, 2, 2.5, 5, 10, ... at any power of ten that is not less.

    >>> _round_step(3), _round_step(0.11)
    (5.0, 0.2)
    """
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least * (1 - 1e-9))
