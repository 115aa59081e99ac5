"""The layers that read the same keys and values, with everything that reads or is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.heads.grouped_products import key_heads_read
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.repetition import find_repetition

_HINT = "merge-kv-heads and share-kv-layers take it with method=mean or method=first"


@dataclass(frozen=True, kw_only=True)
class SharedHeads:
    """Keys and values that one layer or several read.

    Attributes:
        layers: Indices of the layers.
        keys: The keys, each head once.
        values: The values, each head once.
        queries: The queries of each layer.
        contexts: The result of the attention of each layer.
        reads: For each query head the KV head that it reads, the same in each layer.
        kv_heads: Number of KV heads.
        head_dim: Features of one key head.
        value_dim: Features of one value head.
        ends: The nodes at which keys, values and queries end.
    """

    layers: tuple[int, ...]
    keys: ir.Value
    values: ir.Value
    queries: tuple[ir.Value, ...]
    contexts: tuple[ir.Value, ...]
    reads: tuple[int, ...]
    kv_heads: int
    head_dim: int
    value_dim: int
    ends: frozenset[ir.Node]

    @property
    def key_width(self) -> int:
        """Features of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Features of all value heads."""
        return self.kv_heads * self.value_dim

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of heads of the keys, then of the queries of each layer."""
        return (self.kv_heads, *(len(self.reads) for _ in self.queries))


def find_shared_heads(analysis: Analysis) -> list[SharedHeads]:
    """Return the keys and values of a model, with the layers that read them.

    Raises:
        UnsupportedError: A layer has several products with keys or values, or its heads cannot be traced.
    """
    trace = IndexTrace(analysis.flow)
    groups: dict[tuple[ir.Value, ir.Value], list[int]] = {}
    for layer, site in enumerate(analysis.sites):
        groups.setdefault(_starts(trace, layer, site), []).append(layer)
    values = [value for pair in groups for value in pair]
    if len(set(values)) < len(values):
        raise UnsupportedError(
            "layers share keys and values with different layers, or read one tensor as both",
            code=Code.UNTRACEABLE_HEADS, at=values[0].name, hint=_HINT,
        )  # fmt: skip
    return [_shared(analysis, keys, values, layers) for (keys, values), layers in groups.items()]


def _starts(trace: IndexTrace, layer: int, site: AttentionSite) -> tuple[ir.Value, ir.Value]:
    """The keys and the values of a layer, each head once."""
    if len(site.keys) != 1 or len(site.values) != 1 or site.other_inputs:
        raise UnsupportedError(
            "attention has several products with keys or values", code=Code.UNTRACEABLE_HEADS, at=site.at.name,
            layer=layer, hint=_HINT,
        )  # fmt: skip
    counts = counts_of(trace.flow, site)
    keys, values = (find_repetition(trace, layer, site, one, counts) for one in (site.keys[0], site.values[0]))
    if keys.sharing != values.sharing or not (keys.heads.tolist() == values.heads.tolist()):
        raise UnsupportedError(
            "keys and values are repeated in different ways", code=Code.UNTRACEABLE_HEADS, at=site.at.name, layer=layer,
            hint="run the pass before inject, which may have changed how heads are repeated",
        )  # fmt: skip
    return keys.start, values.start


def _shared(analysis: Analysis, keys: ir.Value, values: ir.Value, layers: Sequence[int]) -> SharedHeads:
    sites = [analysis.sites[layer] for layer in layers]
    counts = counts_of(analysis.flow, sites[0])
    reads = {key_heads_read(analysis, layer) for layer in layers}
    if len(reads) != 1:
        raise UnsupportedError(
            "layers that share keys read them in different ways", code=Code.UNTRACEABLE_HEADS, at=keys.name
        )
    return SharedHeads(
        layers=tuple(layers), keys=keys, values=values, queries=tuple(map(query_of, sites)),
        contexts=tuple(site.at for site in sites), reads=reads.pop(), kv_heads=counts.kv_heads,
        head_dim=counts.head_dim, value_dim=counts.value_dim,
        ends=frozenset(node for site in sites for node in _ends(site)),
    )  # fmt: skip


def query_of(site: AttentionSite) -> ir.Value:
    """The queries of an attention, as its product reads them."""
    if site.fused is not None:
        value = site.fused.node.inputs[site.fused.inputs.query]
    else:
        value = site.scores[0].node.inputs[site.scores[0].query_index()]
    assert value is not None
    return value


def _ends(site: AttentionSite) -> list[ir.Node]:
    if site.fused is not None:
        return [site.fused.node]
    return [*(score.node for score in site.scores), *site.ends]
