"""Share keys and values across layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from kvsurgeon.errors import UsageError
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.heads.replace_heads import HeadReplacer, NewHeads
from kvsurgeon.heads.selection import average_layers
from kvsurgeon.passes.contract import Outcome, Subject
from kvsurgeon.passes.heads.change_heads import check_one_of, replace_heads


@dataclass(frozen=True, kw_only=True)
class ShareKvLayers:
    """Share keys and values across layers (multi-layer key-value heads, MLKV): fewer layers have a cache entry.

    Before: a cache entry for each layer. After: `kv_layers` entries, each read by a group of neighboring layers. With a
    text (`--text FILE`), queries and output projections are fitted to the keys and values of the other layer; without
    one, these are means. Not exact: the report states the accuracy loss.

    Not supported: layers with other head counts or other rotary embeddings than the one whose keys they would read,
    means of quantized weights (`method=first` copies stored weights), heads that cannot be traced to weights.

    Attributes:
        kv_layers: Number of layers that compute keys and values: the first one of each group.
        method: Keys and values of a group: those of its first layer, fitted to the others by least squares on a text;
            the mean of its layers, their running mean, or those of the first. By default least squares if a text is
            given, else the mean.
        map: For each layer the index of the layer whose keys and values it reads, instead of `kv_layers`.
    """

    name: ClassVar[str] = "share-kv-layers"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    kv_layers: int | None = None
    method: Literal["least-squares", "mean", "running", "first"] | None = None
    map: tuple[int, ...] = ()

    def apply(self, subject: Subject) -> Outcome:
        """Share the keys and values of layers.

        Raises:
            UsageError: The number of layers or the map is not valid.
            UnsupportedError: The weights of the heads cannot be found or averaged, or layers compute keys differently,
                for example with other rotary embeddings.
        """
        check_one_of(self.name, {"--kv-layers": self.kv_layers is not None, "--map": bool(self.map)})
        method = self.method or ("mean" if subject.text is None else "least-squares")
        calibrate = None
        if method == "least-squares":
            calibrate = partial(self._fit_weights, subject.text_for("for method=least-squares"))
        return replace_heads(subject, partial(self._plan, method), lossy=True, calibrate=calibrate)

    def _fit_weights(self, text: Path, subject: Subject) -> tuple[str, ...]:
        from kvsurgeon.calibration import read_other_layers  # onnxruntime is slow to import

        analysis = subject.analysis()
        with deep_recursion():
            return read_other_layers(analysis, self._owners(len(analysis.sites)), text, subject.folder)

    def _owners(self, layers: int) -> list[int]:
        return self._checked_map(layers) if self.map else self._even_groups(layers)

    def _plan(self, method: str, replacer: HeadReplacer) -> list[NewHeads | None]:
        layers = len(replacer.counts)
        owners = self._owners(layers)
        new: dict[int, NewHeads | None] = {}
        for owner in dict.fromkeys(owners):
            group = [layer for layer in range(layers) if owners[layer] == owner]
            _check_compatible(replacer, owner, group)
            weights = _weights(method, len(group))
            selection = average_layers(replacer.counts[owner].kv_heads, weights)
            new[owner] = (tuple(group[: len(weights)]), selection) if len(group) > 1 else None
        return [new[owner] for owner in owners]

    def _even_groups(self, layers: int) -> list[int]:
        if self.kv_layers not in range(1, layers + 1):
            raise UsageError(f"the model has {layers} attention layers: expected 1 to {layers}, found {self.kv_layers}")
        return owners_of(layers, self.kv_layers or 0)

    def _checked_map(self, layers: int) -> list[int]:
        if len(self.map) != layers:
            raise UsageError(f"expected a map with a layer for each of {layers} layers, found {len(self.map)}")
        for layer, owner in enumerate(self.map):
            if not 0 <= owner <= layer or self.map[owner] != owner:
                raise UsageError(
                    f"expected a map in which layer {layer} reads itself or an earlier layer that reads itself, "
                    f"found {owner}"
                )
        return list(self.map)


def _weights(method: str, layers: int) -> list[int]:
    """Return the weight of each layer of a group in their mean; in a running mean w = (w + next) / 2."""
    if method in ("first", "least-squares"):
        return [1]
    if method == "mean":
        return [1] * layers
    return [1, *(2**layer for layer in range(layers - 1))]


def owners_of(layers: int, kv_layers: int) -> list[int]:
    """Return for each layer the one whose keys it reads, in groups of nearly equal size, larger ones first.

    >>> owners_of(6, 3), owners_of(5, 2)
    ([0, 0, 2, 2, 4, 4], [0, 0, 0, 3, 3])
    """
    owners: list[int] = []
    for group in range(kv_layers):
        size = layers // kv_layers + (group < layers % kv_layers)
        owners += [len(owners)] * size
    return owners


def _check_compatible(replacer: HeadReplacer, owner: int, group: Sequence[int]) -> None:
    theirs = replacer.counts[owner]
    for layer in group:
        mine = replacer.counts[layer]
        if (mine.kv_heads, mine.head_dim, mine.value_dim) != (theirs.kv_heads, theirs.head_dim, theirs.value_dim):
            raise UsageError(
                f"layer {layer} cannot read the keys of layer {owner}: expected {mine.kv_heads} heads of "
                f"{mine.head_dim}, found {theirs.kv_heads} of {theirs.head_dim}"
            )
        if layer != owner:
            replacer.check_same_computation(owner, layer)
