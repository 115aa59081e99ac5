"""What a cache looks like from outside: names, order, layout and type of each entry."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from kvsurgeon.errors import Refused
from kvsurgeon.sequence.analysis import Analysis, Operand
from kvsurgeon.sequence.cuts import bottlenecks

Part = Literal["key", "value"]
CANONICAL_AXIS = 2  # of the sequence in [batch, kv_heads, sequence, head_dim]


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
        idiom: Whether the output holds past and new rows, is a buffer that these were written into, or holds these.
        layer: Attention layer that reads it, counted in execution order among those with entries; see `located`.
        kind: "key" or "value"; see `located`.
    """

    past: str
    present: str
    dtype: ir.DataType
    shape: tuple[int | str | None, ...]
    axis: int
    rows: str
    declared: bool = False
    idiom: Literal["grow", "in-place", "new-only"] = "grow"
    layer: int | None = None
    kind: Part | None = None


@dataclass(frozen=True, kw_only=True)
class CacheSignature:
    """A whole cache, in the order of the graph's inputs.

    Attributes:
        entries: Its pasts and presents.
        outputs: The names of the presents in the order of the graph's outputs.
        counters: The names of the inputs that were given the number of past tokens, and nothing else.
    """

    entries: tuple[CacheEntry, ...]
    outputs: tuple[str, ...]
    counters: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the pasts in the order of the graph's inputs."""
        return tuple(entry.past for entry in self.entries)

    def located(self, analysis: Analysis) -> CacheSignature:
        """Return the signature with the layer and the kind of each entry, by what attention reads it.

        This is also what shows that it is a cache: the rows lie between a projection and a product of attention.

        Args:
            analysis: Of the graph without the cache.

        Raises:
            Refused: No attention reads what was remembered.
        """
        places = _places(analysis, Counter(entry.rows for entry in self.entries))
        found = []
        for entry in self.entries:
            if not places.get(entry.rows) and entry.declared:
                found.append(entry)
                continue
            if not places.get(entry.rows):
                raise Refused(
                    "what is remembered is neither a key nor a value of any attention", at=entry.past,
                    found=f"new rows `{entry.rows}`",
                )  # fmt: skip
            layer, kind = places[entry.rows].pop(0)
            found.append(replace(entry, layer=layer, kind=kind))
        return replace(self, entries=tuple(found))


def _places(analysis: Analysis, rows: Counter[str]) -> dict[str, list[tuple[int, Part]]]:
    """Layer and kind of each value that is remembered, by its name: as often as it is, keys and values in one first."""
    places: dict[str, list[tuple[int, Part]]] = {}
    layer = 0
    for head in analysis.heads:
        fresh = False
        parts: tuple[tuple[Part, tuple[Operand, ...]], ...] = (("key", head.keys), ("value", head.values))
        for kind, operands in parts:
            for node, index in (operand.place for operand in operands):
                value = node.inputs[index]
                assert value is not None
                passed = {one.name or "" for one in bottlenecks(analysis.flow, [value])}
                for name in passed & set(rows):
                    known = places.setdefault(name, [])
                    if len(known) < rows[name] and (layer, kind) not in known:
                        known.append((layer, kind))
                        fresh = True
        layer += fresh
    return places
