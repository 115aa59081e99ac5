"""The graph around one attention, from the projections to the output, as vertices and edges."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from kvsurgeon.anatomy import Attention, Decoder
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.query import downstream, producers, upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.symbolic.fact import Fact

Facts = Mapping[ir.Value, Fact]
VertexKind = Literal["operator", "projection", "past", "present", "context", "output"]
_MOST_OPERATORS = 80  # of a legible picture
_SHAPE_TYPES = (ir.DataType.INT64, ir.DataType.INT32)
_SHORT = 32  # characters of a name


@dataclass(frozen=True, kw_only=True)
class Vertex:
    """One box of the picture.

    Attributes:
        name: Name of the value that it stands for, unique in the picture.
        kind: What it stands for.
        label: Text in the box.
    """

    name: str
    kind: VertexKind
    label: str


@dataclass(frozen=True, kw_only=True)
class AttentionGraph:
    """The graph around one attention.

    Attributes:
        vertices: The vertices by name, sources first.
        edges: Pairs of names.
    """

    vertices: Mapping[str, Vertex]
    edges: tuple[tuple[str, str], ...]


def attention_graph(graph: ir.Graph, facts: Facts, decoder: Decoder, layer: int) -> AttentionGraph | str:
    """Return the graph around the attention of a layer, or why it cannot be drawn.

    Args:
        graph: The graph of the file.
        facts: Shapes and types of the same graph in standard operators and without a cache, whose values the decoder
            names.
        decoder: Facts about the model.
        layer: Index of the layer.
    """
    attention = decoder.attentions[layer]
    values = {value.name or "": value for node in graph for value in node.outputs}
    values |= {value.name or "": value for value in graph.inputs}
    sources = {values[name]: vertex for name, vertex in _sources(attention, decoder).items() if name in values}
    output = _output(values, facts, attention)
    if output is None:
        return f"no value of the file depends on `{attention.output}`"
    reached = set(upstream([output], stop=sources.__contains__, inputs=content_inputs))
    presents = {
        values[one.present]: one.present
        for one in decoder.cache
        if values.get(one.past) in reached and one.present in values
    }
    walked = list(upstream([output, *presents], stop=lambda value: value in sources, inputs=content_inputs))
    nodes = _between(graph, producers(value for value in walked if value not in sources), set(sources) & set(walked))
    if not nodes:
        return "no projection of queries, keys or values leads to its output"
    if len(nodes) > _MOST_OPERATORS:
        return f"{len(nodes)} operators are too many to draw"
    shapes = frozenset(value.name for value, fact in facts.items() if fact.dtype in _SHAPE_TYPES)
    return _drawn(nodes, sources, {output: "output", **dict.fromkeys(presents, "present")}, shapes)


def _output(values: Mapping[str, ir.Value], facts: Facts, attention: Attention) -> ir.Value | None:
    """Return the output of an attention: that of the operator if one computes the whole of it."""
    context = next((value for value in facts if value.name == attention.output), None)
    later = () if context is None else downstream([context])
    return next((values[name] for value in later if (name := value.name or "") in values), None)


def _sources(attention: Attention, decoder: Decoder) -> dict[str, Vertex]:
    """Return the vertices at which the picture starts: projections and cache inputs."""
    parts = {"query": attention.query, "key": attention.key, "value": attention.value}
    found: dict[str, list[str]] = {}
    for part, projection in parts.items():
        if projection is not None:
            found.setdefault(projection.output, []).append(part)
    return {
        name: Vertex(name=name, kind="projection", label=f"{' and '.join(names)} projection")
        for name, names in found.items()
    } | {one.past: Vertex(name=one.past, kind="past", label=_short(one.past)) for one in decoder.cache}


def _between(graph: ir.Graph, nodes: Mapping[ir.Node, None], starts: set[ir.Value]) -> list[ir.Node]:
    """Return the nodes, in order, that read the content of a start, directly or not."""
    reached, found = set(starts), []
    for node in graph:
        if node in nodes and not reached.isdisjoint(content_inputs(node)):
            reached.update(node.outputs)
            found.append(node)
    return found


def _drawn(
    nodes: list[ir.Node],
    sources: Mapping[ir.Value, Vertex],
    ends: Mapping[ir.Value, VertexKind],
    shapes: Collection[str | None],
) -> AttentionGraph:
    vertices: dict[str, Vertex] = {}
    edges: dict[tuple[str, str], None] = {}
    names = {value: node.outputs[0].name or "" for node in nodes for value in node.outputs}
    for node in nodes:
        name = names[node.outputs[0]]
        for value in dict.fromkeys(content_inputs(node)):
            source = None if value.name in shapes else _source(value, names, sources)
            if source is not None:
                vertices.setdefault(source.name, source)
                edges[source.name, name] = None
            elif value in names:
                edges[names[value], name] = None
        vertices[name] = Vertex(name=name, kind="operator", label=node.op_type)
        for value in node.outputs:
            if value in ends:
                kind = ends[value]
                label = "attention output" if kind == "output" else _short(value.name or "")
                vertices[f"{value.name} "] = Vertex(name=f"{value.name} ", kind=kind, label=label)
                edges[name, f"{value.name} "] = None
    return AttentionGraph(vertices=vertices, edges=tuple(edges))


def _source(value: ir.Value, names: Mapping[ir.Value, str], sources: Mapping[ir.Value, Vertex]) -> Vertex | None:
    """Return the vertex of a value that is computed outside the picture.

    None for a value inside it, for a constant, and for a shape.
    """
    if value in sources:
        return sources[value]
    if value in names or value.dtype in _SHAPE_TYPES or value.is_initializer() or small_constant(value) is not None:
        return None
    name = value.name or ""
    return Vertex(name=name, kind="context", label=_short(name))


def _short(name: str) -> str:
    tail = name.rsplit("/", 1)[-1] or name
    return tail if len(tail) <= _SHORT else f"…{tail[1 - _SHORT :]}"
