"""What a cache looks like from outside: names, order, layout and type of each entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint, bottlenecks, choose_cache_point
from kvsurgeon.analysis.token_flow import Place
from kvsurgeon.cache.layout import Layout, layouts_of
from kvsurgeon.cache.length_inputs import Tally
from kvsurgeon.cache.pairs import CacheMode
from kvsurgeon.errors import UnsupportedError

Part = Literal["key", "value", "state"]


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One past input with its present output, and the tensor of the graph that they remember.

    Attributes:
        past: Name of the input.
        present: Name of the output.
        dtype: Type of both.
        shape: Dimensions of the input as the model declares them; None where one has no name.
        axis: Place of the sequence among them.
        rows: Name of the value that holds the rows of the new tokens, in the graph without the cache.
        declared: Whether an operator says itself that it is a past, so that nothing else has to show it.
        cache_mode: Whether the output holds past and new rows, is a buffer that holds them, or holds new rows only.
        layout: Which of its axes is which; None where it has other axes than these four; see `located`.
        layer: Attention layer that reads it, counted in execution order among those with entries, or the number of the
            state; see `located`.
        kind: "key", "value", or "state" of what sees earlier tokens outside attention; see `located`.
    """

    past: str
    present: str
    dtype: ir.DataType
    shape: tuple[int | str | None, ...]
    axis: int
    rows: str
    declared: bool = False
    cache_mode: CacheMode = "dynamic"
    layout: Layout | None = None
    layer: int | None = None
    kind: Part | None = None


@dataclass(frozen=True, kw_only=True)
class CacheSignature:
    """A whole cache, in the order of the graph's inputs.

    Attributes:
        entries: Its pasts and presents.
        inputs: The names of all inputs of the graph, in order.
        outputs: The names of all its outputs, in order.
        tally: Where the number of past tokens is read; None where several inputs tell it.
        room: Rows of a buffer, where they are a number.
    """

    entries: tuple[CacheEntry, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tally: Tally | None
    room: int | None

    def located(self, analysis: Analysis, noted: Mapping[Part, Layout] | None = None) -> CacheSignature:
        """Return the signature with layer, kind and layout of each entry, by what attention reads it.

        This is also what shows that it is a cache: the rows lie between a projection and a product of attention, or
        before an operator that sees earlier tokens outside attention.

        Args:
            analysis: Of the graph without the cache.
            noted: CacheLayouts of keys and of values that the file notes, for axes that their sizes do not tell apart.

        Raises:
            UnsupportedError: Nothing that sees earlier tokens reads what was remembered.
        """
        places = _places(analysis, Counter(entry.rows for entry in self.entries))
        found = []
        for entry in self.entries:
            if not places.get(entry.rows) and entry.declared:
                found.append(entry)
                continue
            if not places.get(entry.rows):
                raise UnsupportedError(
                    "what is remembered is neither a key nor a value of any attention, nor a state beside one",
                    at=entry.past, found=f"new rows `{entry.rows}`",
                )  # fmt: skip
            layer, kind, memory = places[entry.rows].pop(0)
            layout = _layout(entry, memory, (noted or {}).get("key" if kind == "key" else "value"))
            found.append(replace(entry, layer=layer, kind=kind, layout=layout))
        return replace(self, entries=tuple(found))


def _layout(entry: CacheEntry, memory: CachePoint, noted: Layout | None) -> Layout | None:
    """Which axis of an entry is which, by their sizes."""
    batch = memory.batch if isinstance(memory.batch, int) else None
    possible = list(layouts_of(entry.shape, entry.axis, batch=batch, heads=memory.heads, head_dim=memory.head_dim))
    return noted if noted in possible else next(iter(possible), None)


def _places(analysis: Analysis, rows: Counter[str]) -> dict[str, list[tuple[int, Part, CachePoint]]]:
    """Layer and kind of each value that is remembered, by its name: as often as it is, keys and values in one first."""
    places: dict[str, list[tuple[int, Part, CachePoint]]] = {}

    def take(number: int, kind: Part, place: Place, memory: CachePoint) -> bool:
        """Whether the operand of a place is made of something that is remembered, and not yet taken for another."""
        fresh = False
        node, index = analysis.flow.origin(place)
        value = node.inputs[index]
        assert value is not None
        for name in {one.name or "" for one in bottlenecks(analysis.flow, [value])} & set(rows):
            known = places.setdefault(name, [])
            if len(known) < rows[name] and (number, kind) not in [one[:2] for one in known]:
                known.append((number, kind, memory))
                fresh = True
        return fresh

    layer = 0
    for head in analysis.heads:
        parts: tuple[tuple[Part, tuple[CachedOperand, ...]], ...] = (("key", head.keys), ("value", head.values))
        layer += any([take(layer, kind, one.place, one.memory) for kind, operands in parts for one in operands])
    state = 0
    for place in (place for recall in analysis.flow.states for place in recall.places):
        state += take(state, "state", place, choose_cache_point(analysis.flow, place))
    return places
