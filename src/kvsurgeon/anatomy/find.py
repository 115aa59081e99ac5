"""Collect the facts about a decoder from its analysis and its proof."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_data import upstream_tokens
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.anatomy.facts import Attention, CachedTensor, CachePointFacts, CrossAttention, Decoder, Input, Projection
from kvsurgeon.anatomy.masks import read_mask
from kvsurgeon.anatomy.rotary import rotary_dim
from kvsurgeon.anatomy.scales import read_scale
from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.cache.signature import CacheSignature
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import producers
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.proof.proof import Proof
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, Dimension

_WEIGHT_VIEWS = (Trait.TRANSPOSE, Trait.IDENTITY, Trait.RESHAPE, Trait.QUANTIZATION)  # of a stored weight


def decoder_facts(analysis: Analysis, proof: Proof) -> Decoder:
    """Return the facts about a decoder that was analyzed and proved causal."""
    states = len(analysis.flow.states)
    exception = f", except {states} with a sequence state," if states else ""
    return Decoder(
        attentions=tuple(_attentions(analysis, proof)),
        inputs=tuple(map(_input, analysis.inputs)),
        opset=analysis.shapes.opset,
        max_length=proof.max_length,
        proved=(
            f"operators outside attention{exception} do not mix tokens (by their axes)",
            f"attention is causal{_how(proof, 'causal')}",
            f"context of a position does not depend on the number of later tokens{_how(proof, 'prefix-stable')}",
        ),
        states=tuple(_cache_point(point, analysis.rows_of(point.value)) for point in analysis.cached_states),
        cross_attentions=tuple(_cross_attentions(analysis)),
        assumed=tuple(f"{assumption} (first at `{name}`)" for assumption, name in proof.assumptions.items()),
    )


def _how(proof: Proof, name: str) -> str:
    """Return how an obligation was established, as text behind it."""
    found = next(obligation for obligation in proof.obligations if obligation.name == name)
    if found.status == "proved":
        return " (for every length)"
    return f" ({found.status} up to {max(found.lengths)} tokens)" if found.lengths else f" ({found.status})"


def cache_facts(signature: CacheSignature) -> Iterator[CachedTensor]:
    """Yield the facts about each entry of a located cache."""
    length = signature.length_input
    for entry in signature.entries:
        assert entry.layer is not None, "the signature is not located"
        assert entry.kind is not None, "the signature is not located"
        yield CachedTensor(
            past=entry.past,
            present=entry.present,
            layer=entry.layer,
            kind=entry.kind,
            dtype=str(entry.dtype.numpy()),
            shape=tuple("?" if size is None else size for size in entry.shape),
            cache_mode=entry.cache_mode,
            operator=entry.operator,
            past_length=None if length is None else length.source.name,
        )


def _attentions(analysis: Analysis, proof: Proof) -> Iterator[Attention]:
    owner: dict[ir.Value, int] = {}
    flow = analysis.flow
    masks = {id(pattern): read_mask(pattern) for pattern in {id(one): one for one in proof.patterns}.values()}
    for layer, site in enumerate(analysis.sites):
        key, value = site.keys[0], site.values[0]
        shared = owner.get(key.cache_point.value) if value.cache_point.value in owner else None
        owner.setdefault(key.cache_point.value, layer)
        owner.setdefault(value.cache_point.value, layer)
        counts = counts_of(flow, site)
        query = _query_place(site)
        scale, softcap = read_scale(flow, site, query, counts.head_dim)
        projections = _projections(flow, (query, key.place, value.place))
        yield Attention(
            layer=layer,
            output=site.at.name or "",
            scores=(site.scores[0].node.outputs[0] if site.scores else site.at).name or "",
            query_heads=counts.heads,
            kv_heads=counts.kv_heads,
            head_dim=counts.head_dim,
            value_head_dim=counts.value_dim,
            scale=scale,
            softcap=softcap,
            mask=masks[id(proof.patterns[layer])],
            rotary_dim=rotary_dim(flow, key.place, counts.head_dim),
            head_repetition=(*_head_repetition(flow, key.place), *_head_repetition(flow, value.place)),
            query=projections[0],
            key=projections[1],
            value=projections[2],
            key_cache=_cache_point(key.cache_point),
            value_cache=_cache_point(value.cache_point),
            shares_cache_with=shared,
        )


def _cross_attentions(analysis: Analysis) -> Iterator[CrossAttention]:
    for layer, found in enumerate(analysis.cross_attentions):
        key, value = found.key, found.value
        yield CrossAttention(
            layer=layer,
            output=found.output.name or "",
            scores=found.scores.name or "",
            inputs=tuple(sorted(one.name or "" for one in found.inputs)),
            key_length=found.key_length if isinstance(found.key_length, int) else str(found.key_length),
            kv_heads=None if key is None else key.heads,
            head_dim=None if key is None else key.head_dim,
            key=None if key is None else key.value.name,
            value=None if value is None else value.value.name,
        )


def _query_place(site: AttentionSite) -> Place:
    if site.fused is not None:
        return site.fused.node, site.fused.inputs.query
    return site.scores[0].node, site.scores[0].query_index()


def _upstream(flow: TokenFlow, place: Place) -> Iterator[ir.Node]:
    """The nodes on token data from an operand up to its projection, nearest first."""
    node, index = place
    return iter(producers(upstream_tokens(flow, node.inputs[index])))


def _projections(flow: TokenFlow, places: tuple[Place, ...]) -> list[Projection | None]:
    """The projections of several operands; one that computes more than one of them is fused."""
    found = [_projection(flow, place) for place in places]
    outputs = [projection.output for projection in found if projection is not None]
    return [None if one is None else replace(one, fused=outputs.count(one.output) > 1) for one in found]


def _projection(flow: TokenFlow, place: Place) -> Projection | None:
    """The product with weights of an operand, and the weights of the nodes in between."""
    names: list[str] = []
    output = ""
    for node in _upstream(flow, place):
        weights = (_initializer(value) for value in node.inputs)
        names = [name for name in weights if name is not None and name not in names] + names
        if has_trait(node, Trait.PROJECTION):
            output = node.outputs[0].name or ""
    return Projection(initializers=tuple(names), output=output) if output else None


def _initializer(value: ir.Value | None) -> str | None:
    """The name of the weights that a constant operand is made from; None for small constants such as shapes."""
    for _ in range(6):
        if value is None:
            return None
        tensor = constant_tensor(value)
        if tensor is not None:
            return (value.name or "") if tensor.dtype.is_floating_point() or tensor.size > 64 else None
        node = value.producer()
        if node is None or not has_trait(node, *_WEIGHT_VIEWS):
            return None
        value = node.inputs[0]
    return None


def _head_repetition(flow: TokenFlow, place: Place) -> Iterator[str]:
    """Names of the values at which an operand gets more heads."""
    for node in _upstream(flow, place):
        if not has_trait(node, Trait.REPEAT) or node.inputs[0] is None:
            continue
        before, after = flow.shapes[node.inputs[0]].shape, flow.shapes[node.outputs[0]].shape
        times = None if before is None or after is None else dim.exact_quotient(dim.product(after), dim.product(before))
        if isinstance(times, int) and times > 1:
            yield node.outputs[0].name or ""


def _cache_point(point: CachePoint, rows: int | None = None) -> CachePointFacts:
    return CachePointFacts(
        value=point.value.name or "",
        dtype=str(point.dtype.numpy()),
        layout=DEFAULT_LAYOUT,
        heads=point.heads,
        head_dim=point.head_dim,
        bytes_per_token=-(-point.bits_per_token // 8),
        rows=rows,
    )


def _input(given: InputRole) -> Input:
    def name(size: Dimension) -> str | int:
        return size if isinstance(size, int) else "batch_size" if size is BATCH else str(size)

    lengths = given.lengths
    return Input(
        name=given.value.name or "",
        dtype=str(given.value.dtype.numpy()) if given.value.dtype else "",
        shape=tuple(size if isinstance(size, int) else str(size) for size in given.dimensions),
        decode_shape=tuple(
            lengths[axis].value if axis in lengths else name(size) for axis, size in enumerate(given.dimensions)
        ),
    )
