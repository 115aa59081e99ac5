"""Turn what was followed and proved into facts that anybody can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, AttentionSite, analyze
from kvsurgeon.analysis.cache_points import PROJECTIONS, CachePoint
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.anatomy.facts import Attention, CachedTensor, Cut, Decoder, Input, Projection, Rotary
from kvsurgeon.anatomy.masks import read_mask
from kvsurgeon.anatomy.scales import read_scale
from kvsurgeon.cache.signature import CacheSignature
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.decompose import decompose
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.proof.proof import Proof, prove
from kvsurgeon.rewrite.cache_removal import eject
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH
from kvsurgeon.symbolic.sequence_axes import Length

LAYOUT = ("batch", "kv_heads", "sequence", "head_dim")


def find_decoder(model: ir.Model) -> Decoder:
    """Return the anatomy of a causal decoder, as it is in a first call where it has a cache.

    Raises:
        UnsupportedError: It is none, cannot be handled soundly, or its cache cannot be told from the rest.
    """
    with deep_recursion():
        ejection = eject(model)
        written = decompose(model if ejection is None else ejection.model)
        analysis = analyze(written.model)
        analysis.flow.assumed.update(written.assumed)
        decoder = describe(analysis, prove(analysis))
        if ejection is None:
            return decoder
        return replace(decoder, cache=tuple(_cached(ejection.signature.located(analysis))))


def describe(analysis: Analysis, proof: Proof) -> Decoder:
    """Return the facts of an analysis that was proved."""
    tried = ", ".join(str(length) for length in proof.lengths[:6]) + (", ..." if len(proof.lengths) > 6 else "")
    return Decoder(
        attentions=tuple(_attentions(analysis, proof)),
        inputs=tuple(_input(given) for given in analysis.inputs),
        opset=analysis.shapes.opset,
        max_length=proof.max_length,
        proved=(
            f"every operator outside attention{_but_for(analysis)} keeps tokens apart (by its axes)",
            f"no query sees a key after it (context run at lengths {tried})",
            f"context of a position does not change with the tokens that follow (context run at lengths {tried})",
        ),
        states=tuple(_cut(memory) for memory in analysis.states),
        assumed=tuple(f"{what} (first at `{where}`)" for what, where in analysis.flow.assumed.items()),
    )


def _cached(signature: CacheSignature) -> Iterator[CachedTensor]:
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
        )


def _but_for(analysis: Analysis) -> str:
    recalls = analysis.flow.states
    return f", but for the {len(recalls)} whose state would be remembered," if recalls else ""


def _attentions(analysis: Analysis, proof: Proof) -> Iterator[Attention]:
    owner: dict[ir.Value, int] = {}
    for layer, head in enumerate(analysis.heads):
        key, value = head.keys[0], head.values[0]
        shared = owner.get(key.memory.value) if value.memory.value in owner else None
        owner.setdefault(key.memory.value, layer)
        owner.setdefault(value.memory.value, layer)
        counts = counts_of(analysis.flow, head)
        head_dim = counts.head_dim
        query = _query_place(head)
        scale, softcap = read_scale(analysis.flow, head, query, head_dim)
        projections = [_projection(analysis.flow, place) for place in (query, key.place, value.place)]
        outputs = [projection.output for projection in projections if projection is not None]
        yield Attention(
            layer=layer,
            at=head.at.name or "",
            scores=(head.scores[0].node.outputs[0] if head.scores else head.at).name or "",
            query_heads=counts.heads,
            kv_heads=counts.kv_heads,
            head_dim=head_dim,
            value_head_dim=counts.value_dim,
            scale=scale,
            softcap=softcap,
            mask=read_mask(proof.seen[layer]),
            rotary=_rotary(analysis.flow, key.place, head_dim),
            head_repeat=tuple(_repeats(analysis.flow, key.place)) + tuple(_repeats(analysis.flow, value.place)),
            query=_fused(projections[0], outputs),
            key=_fused(projections[1], outputs),
            value=_fused(projections[2], outputs),
            key_cut=_cut(key.memory),
            value_cut=_cut(value.memory),
            shares_cache_with=shared,
        )


def _query_place(head: AttentionSite) -> Place:
    if head.fused is not None:
        return head.fused.node, head.fused.query
    return head.scores[0].node, head.scores[0].query_index()


def upwards(flow: TokenFlow, place: Place) -> Iterator[ir.Node]:
    """The nodes on token data from a product's operand up to its projection, nearest first."""
    node, index = place
    pending = [node.inputs[index]]
    seen: set[ir.Node] = set()
    while pending:
        value = pending.pop(0)
        maker = None if value is None else value.producer()
        if maker is None or maker in seen:
            continue
        seen.add(maker)
        yield maker
        if maker.op_type in PROJECTIONS or len(seen) > 200:
            continue
        pending += [
            source for source in maker.inputs if source is not None and flow.kinds.get(source) is ValueKind.TOKEN
        ]


def _projection(flow: TokenFlow, place: Place) -> Projection | None:
    """The weights that the product with weights and what stands between it and the operand read."""
    names: list[str] = []
    output = ""
    for node in upwards(flow, place):
        found = [name for value in node.inputs for name in _weights(value)]
        names = [name for name in found if name not in names] + names
        if node.op_type in PROJECTIONS:
            output = node.outputs[0].name or ""
    return Projection(initializers=tuple(names), output=output) if output else None


def _weights(value: ir.Value | None) -> Iterator[str]:
    """Names of the initializers behind a constant operand: directly, or behind a transpose or a dequantisation."""
    for _ in range(6):
        if value is None:
            return
        tensor = constant_tensor(value)
        if tensor is not None:
            if tensor.dtype.is_floating_point() or tensor.size > 64:
                yield value.name or ""
            return
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast", "DequantizeLinear", "Identity", "Reshape"):
            return
        value = node.inputs[0]


def _fused(projection: Projection | None, outputs: list[str]) -> Projection | None:
    if projection is None or outputs.count(projection.output) < 2:
        return projection
    return Projection(initializers=projection.initializers, output=projection.output, fused=True)


def _rotary(flow: TokenFlow, place: Place, head_dim: int) -> Rotary | None:
    """A table of context, as wide as the rotated features, multiplies the key."""
    width = 0
    for node in upwards(flow, place):
        if node.op_type == "RotaryEmbedding":
            attribute = node.attributes.get("rotary_embedding_dim")
            width = max(width, int(attribute.value) if attribute is not None and attribute.value else head_dim)
        if node.op_type != "Mul":
            continue
        for index, value in enumerate(node.inputs):
            shape = None if value is None else flow.shapes[value].shape
            table = (node, index) in flow.demands or _is_made_of_positions(flow, value)
            if table and shape and isinstance(shape[-1], int) and shape[-1] > 1:
                width = max(width, shape[-1])
    return Rotary(width=min(width, head_dim), head_dim=head_dim) if width else None


def _is_made_of_positions(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Whether token data comes from positions alone: from an input, through no product with weights and no norm."""
    pending, seen = [value], set[ir.Node]()
    while pending:
        node = None if (value := pending.pop()) is None else value.producer()
        if node is None or node in seen:
            continue
        if node.op_type in PROJECTIONS or "Normalization" in node.op_type or node.op_type == "Pow" or len(seen) > 60:
            return False
        seen.add(node)
        pending += [
            source for source in node.inputs if source is not None and flow.kinds.get(source) is ValueKind.TOKEN
        ]
    return bool(seen)


def _repeats(flow: TokenFlow, place: Place) -> Iterator[str]:
    """Values at which the heads of keys or values become more."""
    for node in upwards(flow, place):
        before, after = (
            flow.shapes[node.inputs[0]].shape if node.inputs[0] else None,
            flow.shapes[node.outputs[0]].shape,
        )
        if node.op_type not in ("Expand", "Tile", "Gather", "Concat") or before is None or after is None:
            continue
        ratio = dim.exact_quotient(dim.product(after), dim.product(before))
        if isinstance(ratio, int) and ratio > 1 and node.op_type in ("Expand", "Tile"):
            yield node.outputs[0].name or ""


def _cut(memory: CachePoint) -> Cut:
    return Cut(
        value=memory.value.name or "",
        dtype=str(memory.dtype.numpy()),
        layout=LAYOUT,
        heads=memory.heads,
        head_dim=memory.head_dim,
        bytes_per_token=-(-memory.bits_per_token // 8),
    )


def _input(given: InputRole) -> Input:
    def words(sizes: tuple[dim.Dimension, ...], lengths: dict[int, Length]) -> tuple[str | int, ...]:
        dim_names: list[str | int] = []
        for axis, size in enumerate(sizes):
            if axis in lengths:
                dim_names.append(lengths[axis].value)
            else:
                dim_names.append(size if isinstance(size, int) else "batch_size" if size is BATCH else str(size))
        return tuple(dim_names)

    return Input(
        name=given.value.name or "",
        dtype=str(given.value.dtype.numpy()) if given.value.dtype else "",
        original=tuple(size if isinstance(size, int) else str(size) for size in given.dimensions),
        given=words(given.dimensions, given.lengths),
    )
