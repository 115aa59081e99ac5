"""Let layers read the keys and values of an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvsurgeon.errors import UsageError
from kvsurgeon.heads.replace_heads import Exchange, Exchanger
from kvsurgeon.heads.selection import blended
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import check_one_of, exchange

Method = Literal["mean", "running", "first"]


@dataclass(frozen=True, kw_only=True)
class ShareKvLayers:
    """Let only some layers make keys and values; the others read those of the closest one before them.

    Before: a cache entry for each layer. After: `kv_layers` of them (multi-layer key-value heads, cross-layer
    attention). Not exact: the model has to be trained on, and the report says how far it is off.

    Not handled: layers with other heads than the one whose keys they would read, or other positions in them, means of
    quantised weights (`method=first` takes stored values), heads that cannot be followed to weights.

    Attributes:
        kv_layers: How many layers keep keys and values: of each group of neighbours the first.
        method: What a group reads: its mean, the running mean of two and two, or its first.
        map: For each layer the one whose keys it reads, counted from 0, in place of `kv_layers`.
    """

    name: ClassVar[str] = "share-kv-layers"
    exact: ClassVar[bool] = False  # so that its command says how much is lost, and of what text

    kv_layers: int | None = None
    method: Method = "mean"
    map: tuple[int, ...] = ()

    def apply(self, subject: Subject) -> Outcome:
        """Share the keys and values of layers.

        Raises:
            UsageError: There cannot be so many layers with keys, or the map is none.
            UnsupportedError: It cannot be proved which weights make the heads, or they have no mean; or layers turn
                keys by
                other positions than the one whose keys they would read.
        """
        check_one_of(self.name, {"--kv-layers": self.kv_layers is not None, "--map": bool(self.map)})
        return exchange(subject, self._plan, lossy=True)

    def _plan(self, exchanger: Exchanger) -> list[Exchange | None]:
        layers = len(exchanger.counts)
        owners = self._checked(layers) if self.map else self._evenly(layers)
        groups = {owner: [layer for layer in range(layers) if owners[layer] == owner] for owner in set(owners)}
        made = {}
        for owner, group in groups.items():
            _check_alike(exchanger, owner, group)
            weights = _weights(self.method, len(group))
            counts = exchanger.counts[owner]
            made[owner] = Exchange(layers=tuple(group[: len(weights)]), selection=blended(counts.kv_heads, weights))
        return [made[owner] if len(groups[owner]) > 1 else None for owner in owners]

    def _evenly(self, layers: int) -> list[int]:
        legal = range(1, layers + 1)
        if self.kv_layers is None or self.kv_layers not in legal:
            raise UsageError(f"the model has {layers} attention layers: expected 1 to {layers}, found {self.kv_layers}")
        return owners_of(layers, self.kv_layers)

    def _checked(self, layers: int) -> list[int]:
        if len(self.map) != layers:
            raise UsageError(f"expected a map with a layer for each of {layers} layers, found {len(self.map)}")
        for layer, owner in enumerate(self.map):
            if not 0 <= owner <= layer or self.map[owner] != owner:
                raise UsageError(
                    f"expected a map in which layer {layer} reads itself or an earlier layer that reads itself, "
                    f"found {owner}"
                )
        return list(self.map)


def owners_of(layers: int, kv_layers: int) -> list[int]:
    """Return for each layer the one whose keys it reads: groups as even as can be, earlier ones the larger.

    >>> owners_of(6, 3), owners_of(5, 2)
    ([0, 0, 2, 2, 4, 4], [0, 0, 0, 3, 3])
    """
    owners: list[int] = []
    for group in range(kv_layers):
        size = layers // kv_layers + (group < layers % kv_layers)
        owners += [len(owners)] * size
    return owners


def _weights(method: Method, layers: int) -> list[int]:
    """How much each layer of a group counts: alike, or each half as much as all before it together have left."""
    if method == "first":
        return [1]
    if method == "mean":
        return [1] * layers
    return [1, *(2**layer for layer in range(layers - 1))]


def _check_alike(exchanger: Exchanger, owner: int, group: Sequence[int]) -> None:
    for layer in group:
        mine, theirs = exchanger.counts[layer], exchanger.counts[owner]
        if (mine.kv_heads, mine.head_dim, mine.value_dim) != (theirs.kv_heads, theirs.head_dim, theirs.value_dim):
            raise UsageError(
                f"layer {layer} cannot read the keys of layer {owner}: expected {mine.kv_heads} heads of "
                f"{mine.head_dim}, found {theirs.kv_heads} of {theirs.head_dim}"
            )
        if layer != owner:
            exchanger.check_alike(owner, layer)
