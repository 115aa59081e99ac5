"""The tensors of a cache: what each holds, what its input and output are called, and how it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.analysis import AttentionSite
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.cache.layout import USUAL, Layout
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.rewrite.cache_layouts import Order
from kvsurgeon.rewrite.dimension_names import dim_names
from kvsurgeon.symbolic.dimension import BATCH, Dimension


@dataclass(frozen=True, kw_only=True)
class CacheTensor:
    """One tensor of the cache."""

    memory: CachePoint
    past: str  # name of the input
    present: str  # name of the output
    is_key: bool
    layout: Layout
    dtype: ir.DataType  # that the cache is kept in; the graph computes in the memory's own

    @property
    def axis(self) -> int:
        """The axis of the tokens."""
        return self.layout.index("sequence")

    @property
    def order(self) -> Order:
        """The layout as places in the usual one."""
        first, second, third, fourth = (USUAL.index(axis) for axis in self.layout)
        return first, second, third, fourth

    def sizes(self, rows: Dimension) -> list[Dimension]:
        """Dimensions of a tensor of this entry with so many rows."""
        batch = self.memory.batch if isinstance(self.memory.batch, int) else BATCH
        usual: list[Dimension] = [batch, self.memory.heads, rows, self.memory.head_dim]
        return [usual[place] for place in self.order]

    def shape(self, rows: Dimension) -> list[int | str | None]:
        """The same, dim_names."""
        return dim_names(self.sizes(rows))


@dataclass(frozen=True, kw_only=True)
class CacheNames:
    """Templates of names, layouts and the type of a cache."""

    past: str
    present: str
    key_layout: Layout
    value_layout: Layout
    dtype: ir.DataType | None = None

    def __post_init__(self) -> None:
        for layout in (self.key_layout, self.value_layout):
            if sorted(layout) != sorted(USUAL):
                raise UsageError(f"expected a layout of {', '.join(USUAL)} in any order, found {', '.join(layout)}")

    def entry(self, memory: CachePoint, layer: int, kind: str) -> CacheTensor:
        """Return the tensor of a layer."""
        narrow = self.dtype is not None and memory.dtype.is_floating_point()
        return CacheTensor(
            memory=memory,
            past=_filled(self.past, layer, kind),
            present=_filled(self.present, layer, kind),
            is_key=kind == "key",
            layout=self.key_layout if kind == "key" else self.value_layout,
            dtype=self.dtype if narrow and self.dtype is not None else memory.dtype,
        )


def find_entries(heads: Sequence[AttentionSite], states: Sequence[CachePoint], naming: CacheNames) -> list[CacheTensor]:
    """Return the tensors to remember, each once: key 0, value 0, key 1, ..., and then state 0, state 1, ...

    Raises:
        UnsupportedError: An attention reads several tensors of keys, or of values.
        UsageError: A template does not give each tensor a name of its own.
    """
    entries: list[CacheTensor] = []
    seen: set[ir.Value] = set()
    layer = 0
    for number, head in enumerate(heads):
        fresh = [(kind, memory) for kind, memory in head.memories if memory.value not in seen]
        seen |= {memory.value for _, memory in fresh}
        if len({kind for kind, _ in fresh}) < len(fresh):
            raise UnsupportedError(
                "one attention reads several tensors of keys, or of values", layer=number, at=head.at.name
            )
        entries += [naming.entry(memory, layer, kind) for kind, memory in fresh]
        layer += bool(fresh)
    fresh_states = [memory for memory in states if memory.value not in seen]
    entries += [naming.entry(memory, number, "state") for number, memory in enumerate(fresh_states)]
    names = [name for entry in entries for name in (entry.past, entry.present)]
    if len(set(names)) < len(names):
        raise UsageError("expected names with {layer} and {kind} in them, so that each tensor has its own")
    return entries


def _filled(text: str, layer: int, kind: str) -> str:
    try:
        return text.format(layer=layer, kind=kind)
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(f"expected a name such as past.{{layer}}.{{kind}}, found {text!r}") from error
