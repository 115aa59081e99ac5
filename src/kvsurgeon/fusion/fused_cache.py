"""Entries of the cache that one operator reads and writes together with the attention that it computes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.fusion.match import Fusable
from kvsurgeon.fusion.operators import Cache, Operator
from kvsurgeon.rewrite.cache_entries import CacheTensor


class FusedCache:
    """Lets operators make the presents of their attentions."""

    def __init__(self, operator: Operator, fusables: Sequence[Fusable]) -> None:
        self.operator = operator
        self.fusables = fusables
        self._nodes: list[tuple[Fusable, ir.Node]] = []

    def place(self, entries: Sequence[CacheTensor], pasts: Sequence[ir.Value]) -> dict[CacheTensor, ir.Value]:
        """Add the operators, and return the presents that they make."""
        at = {entry.memory.value: (entry, past) for entry, past in zip(entries, pasts, strict=True)}
        made: dict[CacheTensor, ir.Value] = {}
        for fusable in self.fusables:
            (key, past_key), (value, past_value) = at[fusable.key.value], at[fusable.value.value]
            cache = Cache(
                past_key=past_key,
                past_value=past_value,
                present_key=self._present(key, made),
                present_value=self._present(value, made),
            )
            self._nodes.append((fusable, self.operator.place(fusable, cache)))
        return made

    def _present(self, entry: CacheTensor, made: dict[CacheTensor, ir.Value]) -> ir.Value:
        """The present that an operator makes; of attentions that share keys and values the first makes the cache's."""
        name = self.operator.editor.unique_name(f"{entry.present}.again") if entry in made else entry.present
        present = ir.Value(name=name, type=ir.TensorType(entry.dtype))
        made.setdefault(entry, present)
        return present

    def finish(self) -> None:
        """Give the operators what they add to scores, once context has the lengths that it is to have."""
        for fusable, node in self._nodes:
            self.operator.finish(fusable, node)
