"""Layered drawing of a small directed graph as SVG: every edge points down, and long edges bend around boxes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvsurgeon.reporting.page.attention_graph import AttentionGraph

_ROW, _HEIGHT, _GAP, _MARGIN = 46, 24, 14, 8  # units of the picture
_CHARACTER, _PADDING, _BEND = 6.6, 16, 10  # width of a character, of the space around a label, of a bend of an edge
_SWEEPS = 8

Vertices = dict[str, int]  # row of each vertex, bends of long edges included


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A drawing that pictures next to it can share a scale with.

    Attributes:
        content: Its lines and boxes.
        width: Its width.
        height: Its height.
    """

    content: Markup
    width: int
    height: int


def draw_graph(graph: AttentionGraph, changed: Collection[str] = ()) -> Drawing:
    """Return a drawing of a graph.

    Args:
        graph: The graph.
        changed: Names of the vertices to mark.
    """
    rows = _rows(graph)
    chains = _chains(graph, rows)
    links = [pair for chain in chains for pair in itertools.pairwise(chain)]
    widths = {name: _width(graph, name) for name in rows}
    centers = _centers(_ordered(rows, links), links, widths)
    left = min(centers[name] - widths[name] / 2 for name in rows) - _MARGIN
    right = max(centers[name] + widths[name] / 2 for name in rows) + _MARGIN
    height = (max(rows.values()) + 1) * _ROW
    places = {name: (centers[name] - left, row * _ROW + _ROW / 2) for name, row in rows.items()}
    lines = Markup("").join(_line([places[name] for name in chain]) for chain in chains)
    boxes = Markup("").join(_box(graph, name, places[name], widths[name], name in changed) for name in graph.vertices)
    return Drawing(content=lines + boxes, width=round(right - left), height=height)


def _rows(graph: AttentionGraph) -> Vertices:
    """Return the row of each vertex: below all that it is computed from; sources are just above their first use."""
    rows: Vertices = dict.fromkeys(graph.vertices, 0)
    for _ in graph.vertices:
        before = dict(rows)
        for source, target in graph.edges:
            rows[target] = max(rows[target], rows[source] + 1)
        if rows == before:
            break
    targets = {target for _, target in graph.edges}
    for name in graph.vertices:
        if name not in targets:
            rows[name] = min((rows[target] for source, target in graph.edges if source == name), default=1) - 1
    return rows


def _chains(graph: AttentionGraph, rows: Vertices) -> list[list[str]]:
    """Return each edge as the vertices that it passes, with a bend in each row between its ends; the bends get rows."""
    chains = []
    for number, (source, target) in enumerate(graph.edges):
        bends = {f" {number}.{row}": row for row in range(rows[source] + 1, rows[target])}
        rows |= bends
        chains.append([source, *bends, target])
    return chains


def _ordered(rows: Vertices, links: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the vertices of each row, ordered by the mean place of their neighbors above, then below, in turn."""
    order: list[list[str]] = [[] for _ in range(max(rows.values()) + 1)]
    for name, row in rows.items():
        order[row].append(name)
    above, below = _neighbors(links), _neighbors([(target, source) for source, target in links])
    for sweep in range(_SWEEPS):
        neighbors, lines = (above, order) if sweep % 2 == 0 else (below, order[::-1])
        for line in lines:
            place = {name: index / max(len(other), 1) for other in order for index, name in enumerate(other)}
            line.sort(key=lambda name: _mean([place[one] for one in neighbors.get(name, ())], place[name]))
    return order


def _neighbors(links: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for source, target in links:
        found.setdefault(target, []).append(source)
    return found


def _centers(
    order: Sequence[Sequence[str]], links: Sequence[tuple[str, str]], widths: Mapping[str, float]
) -> dict[str, float]:
    """Return horizontal centers: near those of the neighbors, without overlaps."""
    centers: dict[str, float] = {}
    for line in order:
        _spread(line, dict.fromkeys(line, 0.0), widths, centers)
    above, below = _neighbors(links), _neighbors([(target, source) for source, target in links])
    for sweep in range(_SWEEPS):
        for line in order if sweep % 2 == 0 else order[::-1]:
            wanted = {
                name: _mean([centers[one] for one in (*above.get(name, ()), *below.get(name, ()))], centers[name])
                for name in line
            }
            _spread(line, wanted, widths, centers)
    return centers


def _spread(
    line: Sequence[str], wanted: Mapping[str, float], widths: Mapping[str, float], centers: dict[str, float]
) -> None:
    """Place a row in its order: each at the wanted center or to the right of it, then all moved to the mean."""
    end = float("-inf")
    for name in line:
        centers[name] = max(wanted[name], end + widths[name] / 2)
        end = centers[name] + widths[name] / 2 + _GAP
    shift = _mean([wanted[name] - centers[name] for name in line], 0.0)
    for name in line:
        centers[name] += shift


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _width(graph: AttentionGraph, name: str) -> float:
    vertex = graph.vertices.get(name)
    return _BEND if vertex is None else len(vertex.label) * _CHARACTER + _PADDING


def _line(points: Sequence[tuple[float, float]]) -> Markup:
    """Return a smooth line through points, from the bottom of the first box to the top of the last one."""
    x, y = points[0]
    path = [f"M{x:.1f} {y + _HEIGHT / 2:.1f}"]
    for number, (to_x, to_y) in enumerate(points[1:], start=2):
        from_y = y + (_HEIGHT / 2 if number == 2 else 0)
        end_y = to_y - (_HEIGHT / 2 if number == len(points) else 0)
        middle = (from_y + end_y) / 2
        path.append(f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {end_y:.1f}")
        x, y = to_x, to_y
    return Markup('<path d="{}"/>').format(" ".join(path))


def _box(graph: AttentionGraph, name: str, center: tuple[float, float], width: float, changed: bool) -> Markup:
    vertex = graph.vertices[name]
    return Markup(
        '<g class="{}{}"><title>{}</title><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="4"/>'
        '<text x="{:.1f}" y="{:.1f}">{}</text></g>'
    ).format(
        vertex.kind, " changed" if changed else "", f"{vertex.label}: {name.strip()}", center[0] - width / 2,
        center[1] - _HEIGHT / 2, width, _HEIGHT, center[0], center[1] + 4, vertex.label,
    )  # fmt: skip
