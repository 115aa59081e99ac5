"""Merge groups of KV heads into their principal components, in the weights of the projections around attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.calibration.activations import activations
from kvsurgeon.calibration.head_maps import HeadMap, feature_places, head_columns, head_map
from kvsurgeon.calibration.low_rank import LowRankMap, low_rank_map
from kvsurgeon.calibration.moments import SecondMoment
from kvsurgeon.calibration.shared_heads import SharedHeads, find_shared_heads
from kvsurgeon.calibration.token_features import to_features
from kvsurgeon.calibration.weight_products import (
    FeatureChange,
    WeightProduct,
    change_features,
    check_readers,
    product_above,
    product_below,
    stored_weights,
)
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.layout import layout_of
from kvsurgeon.weights.mapped import mapped_elements

_MOMENTS = 1 << 27  # elements of second moments in memory; more layers need the text once more

Changes = list[tuple[WeightProduct, list[FeatureChange]]]
Groups = Sequence[Sequence[int]]  # the KV heads of each group


@dataclass(kw_only=True)
class _Moments:
    """Second moments of keys and values, and of the queries that read each KV head, `[head_dim, head_dim]`."""

    keys: SecondMoment
    values: SecondMoment
    queries: list[SecondMoment] = field(default_factory=list)


def merge_into_first(analysis: Analysis, kv_heads: int, text: Path, folder: Path | None) -> tuple[str, ...]:
    """Change weights so that the first KV head of each group holds what its query heads need of all heads of the group.

    Groups are neighbors. Afterwards the model is right only if the query heads of a group read its first head. Keys
    that pass a norm or something else that is not linear are averaged instead, and so are such values.

    Args:
        analysis: The model, whose weights are replaced.
        kv_heads: Number of groups in each layer that has more KV heads.
        text: The text, on whose first half the model is run.
        folder: Folder of the model.

    Returns:
        Notes about what was averaged.

    Raises:
        UnsupportedError: The weights cannot be found, or both keys and values cannot be merged.
    """
    editor, trace = Editor(analysis.model), IndexTrace(analysis.flow)
    found = [one for one in find_shared_heads(analysis) if one.kv_heads > kv_heads]
    moments = {id(one): moment for batch in _batches(found) for one, moment in _measure(analysis, batch, text, folder)}
    changes: Changes = []
    averaged: dict[str, list[int]] = {}
    for one in found:
        groups = np.arange(one.kv_heads).reshape(kv_heads, -1).tolist()
        reasons: list[UnsupportedError] = []
        for part, merged in (("keys", _merged_keys), ("values", _merged_values)):
            try:
                changes += merged(trace, one, groups, moments[id(one)])
            except UnsupportedError as error:
                if error.code is Code.CANNOT_AVERAGE or len(reasons) == 1:
                    raise
                reasons.append(error)
                changes += _averaged(trace, one, part, groups)
                averaged.setdefault(f"{part} are averaged: {error}", []).append(one.layers[0])
    _check_separate(changes)
    for product, change in changes:
        change_features(editor, product, change)
    editor.finish()
    return tuple(f"{reason} (in {len(layers)} layers)" for reason, layers in averaged.items())


def _check_separate(changes: Changes) -> None:
    """Check that no feature of a product is changed for two purposes, such as keys that are the values.

    Raises:
        UnsupportedError: One is.
    """
    used: dict[ir.Node, set[int]] = {}
    for product, parts in changes:
        own = {int(feature) for part in parts for feature in (*part.source, *part.target)}
        others = used.setdefault(product.node, set())
        if own & others:
            raise UnsupportedError(
                "keys and values, or several layers, are computed from the same weight columns",
                code=Code.UNTRACEABLE_HEADS, at=product.features.name, hint="use method=mean or method=first",
            )  # fmt: skip
        others |= own


def _batches(found: Sequence[SharedHeads]) -> Iterator[list[SharedHeads]]:
    """Yield layers whose second moments fit into memory together."""
    batch: list[SharedHeads] = []
    size = 0
    for one in found:
        own = one.key_width**2 + one.value_width**2
        if batch and size + own > _MOMENTS:
            yield batch
            batch, size = [], 0
        batch.append(one)
        size += own
    if batch:
        yield batch


def _measure(
    analysis: Analysis, batch: Sequence[SharedHeads], text: Path, folder: Path | None
) -> list[tuple[SharedHeads, _Moments]]:
    """Return the second moments of the keys, values and queries of some layers on a text."""
    moments = [
        _Moments(
            keys=SecondMoment(one.key_width), values=SecondMoment(one.value_width),
            queries=[SecondMoment(one.head_dim) for _ in range(one.kv_heads)],
        )
        for one in batch
    ]  # fmt: skip
    values = {value.name or "": value for one in batch for value in (one.keys, one.values, *one.queries)}
    layouts = {name: layout_of(analysis.flow, value) for name, value in values.items()}
    for row in activations(analysis.model, list(values), text, folder=folder):

        def features(value: ir.Value, row: dict[str, np.ndarray] = row) -> np.ndarray:
            name = value.name or ""
            layout = layouts[name]
            found: np.ndarray = to_features(row[name], layout, 1, row[name].size // layout.width)[0]
            return found

        for one, moment in zip(batch, moments, strict=True):
            moment.keys.add(features(one.keys))
            moment.values.add(features(one.values))
            for query in one.queries:
                heads = features(query).reshape(-1, len(one.reads), one.head_dim)
                for head, kv_head in enumerate(one.reads):
                    moment.queries[kv_head].add(heads[:, head])
    for one, moment in zip(batch, moments, strict=True):
        moment.keys.check(one.keys.name or "")
        moment.values.check(one.values.name or "")
        for query in one.queries:
            for one_head in moment.queries:
                one_head.check(query.name or "")
    return list(zip(batch, moments, strict=True))


def _merged_keys(trace: IndexTrace, one: SharedHeads, groups: Groups, moments: _Moments) -> Changes:
    """Return the changes that merge keys, and those of the queries that read them.

    Raises:
        UnsupportedError: Keys or queries are not linear in their projection, or rotated in different pairs.
    """
    flow = trace.flow
    products = [product_above(trace, value) for value in (one.keys, *one.queries)]
    maps: list[HeadMap] = []
    for product, value, heads in zip(products, (one.keys, *one.queries), one.counts, strict=True):
        check_readers(flow, product, one.ends)
        maps.append(head_map(flow, product.features, value, head_columns(flow, product.features, value, heads)))
    keys, *queries = maps
    planes = keys.planes
    if any(set(query.planes) != set(planes) for query in queries) or max(map(len, planes)) > 2:
        raise UnsupportedError(
            "keys and queries are rotated in different ways", code=Code.UNTRACEABLE_HEADS, at=one.keys.name,
            expected="pairs of features", found=f"{len(planes)} sets of up to {max(map(len, planes))} features",
        )  # fmt: skip
    changes: list[list[FeatureChange]] = [[] for _ in maps]
    for group in groups:
        encoders, decoders = _key_components(planes, group, moments, one.head_dim)
        changes[0].append(_into_first(keys, group, encoders))
        for query, change in zip(queries, changes[1:], strict=True):
            rotated = {head: query.on_columns(decoder.T) for head, decoder in zip(group, decoders, strict=True)}
            for head, kv_head in enumerate(one.reads):
                if kv_head in rotated:
                    columns = query.columns[head]
                    change.append(FeatureChange(target=columns, source=columns, matrix=rotated[kv_head].T))
    return list(zip(products, changes, strict=True))


def _key_components(
    planes: Sequence[tuple[int, ...]], group: Sequence[int], moments: _Moments, size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return for each head of a group the matrix into the merged head, and the one back.

    A rotation of two features is the product with a complex number: such factors commute with a rotary embedding.
    """
    encoders, decoders = ([np.zeros((size, size)) for _ in group] for _ in range(2))
    heads = len(moments.keys.total) // size
    total = moments.keys.total.reshape(heads, size, heads, size)
    for first, second in (plane for plane in planes if len(plane) == 2):
        straight = total[np.ix_(group, [first], group, [first])] + total[np.ix_(group, [second], group, [second])]
        crossed = total[np.ix_(group, [second], group, [first])] - total[np.ix_(group, [first], group, [second])]
        moment = (straight + 1j * crossed).reshape(len(group), len(group))
        queries = [moments.queries[head].total for head in group]
        weights = [np.array([[one[first, first] + one[second, second]]]) for one in queries]
        found = low_rank_map(moment, weights, 1)
        for place in range(len(group)):
            _put(encoders[place], first, second, found.encode[0, place])
            _put(decoders[place], first, second, found.decode[place, 0])
    plain = [plane[0] for plane in planes if len(plane) == 1]
    if plain:
        weights = [moments.queries[head].total[np.ix_(plain, plain)] for head in group]
        block = total[np.ix_(group, plain, group, plain)].reshape(len(group) * len(plain), -1)
        found = low_rank_map(block, weights, len(plain))
        for place in range(len(group)):
            part = slice(place * len(plain), (place + 1) * len(plain))
            encoders[place][np.ix_(plain, plain)] = found.encode[:, part]
            decoders[place][np.ix_(plain, plain)] = found.decode[part]
    return encoders, decoders


def _put(matrix: np.ndarray, first: int, second: int, factor: complex) -> None:
    """Write the product with a complex number as a matrix on two features."""
    matrix[first, first] = matrix[second, second] = factor.real
    matrix[second, first], matrix[first, second] = factor.imag, -factor.imag


def _merged_values(trace: IndexTrace, one: SharedHeads, groups: Groups, moments: _Moments) -> Changes:
    """Return the changes that merge values, and those of the output projections.

    Raises:
        UnsupportedError: Values are not linear in their projection, or something else than a projection reads the
            result of the attention.
    """
    flow = trace.flow
    above = product_above(trace, one.values)
    check_readers(flow, above, one.ends)
    columns = head_columns(flow, above.features, one.values, one.kv_heads)
    values = head_map(flow, above.features, one.values, columns)
    below = [product_below(trace, context) for context in one.contexts]
    rows = [
        feature_places(flow, context, product.features).reshape(len(one.reads), -1)
        for context, product in zip(one.contexts, below, strict=True)
    ]
    size, heads = one.value_dim, one.kv_heads
    weights = [np.zeros((size, size)) for _ in range(heads)]
    for product, places in zip(below, rows, strict=True):
        by_row = _rows_of_weights(product)
        for head, kv_head in enumerate(one.reads):
            part = by_row[places[head]].astype(np.float64)
            weights[kv_head] += part @ part.T
    total = moments.values.total.reshape(heads, size, heads, size)
    own: list[FeatureChange] = []
    others: list[list[FeatureChange]] = [[] for _ in below]
    for group in groups:
        block = total[np.ix_(group, range(size), group, range(size))].reshape(len(group) * size, -1)
        found = low_rank_map(block, [weights[head] for head in group], size)
        encoders, decoders = _split(found, len(group))
        own.append(_into_first(values, group, encoders))
        for places, change in zip(rows, others, strict=True):
            for head, kv_head in enumerate(one.reads):
                if kv_head in group:
                    decoder = decoders[group.index(kv_head)]
                    change.append(FeatureChange(target=places[head], source=places[head], matrix=decoder))
    return [(above, own), *zip(below, others, strict=True)]


def _split(found: LowRankMap, heads: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the encoder and decoder of each head."""
    return np.split(found.encode, heads, axis=1), np.split(found.decode, heads, axis=0)


def _into_first(heads: HeadMap, group: Sequence[int], encoders: Sequence[np.ndarray]) -> FeatureChange:
    """Return the change that makes the first head of a group the sum of all, each encoded."""
    matrices = [heads.on_columns(encoder).T for encoder in encoders]
    source = np.concatenate([heads.columns[head] for head in group])
    return FeatureChange(target=heads.columns[group[0]], source=source, matrix=np.concatenate(matrices))


def _averaged(trace: IndexTrace, one: SharedHeads, part: str, groups: Groups) -> Changes:
    """Return the changes that make the first head of each group the mean of all."""
    value = one.keys if part == "keys" else one.values
    product = product_above(trace, value)
    check_readers(trace.flow, product, one.ends)
    columns = head_columns(trace.flow, product.features, value, one.kv_heads)
    mean = np.eye(columns.shape[1])
    return [
        (product, [
            FeatureChange(
                target=columns[group[0]], source=np.concatenate([columns[head] for head in group]),
                matrix=np.concatenate([mean / len(group)] * len(group)),
            )
            for group in groups
        ])
    ]  # fmt: skip


def _rows_of_weights(product: WeightProduct) -> np.ndarray:
    """Return the weights below an attention, a row for each feature that they read."""
    (operand,) = product.operands
    stored = stored_weights(operand)
    assert stored is not None
    rows: np.ndarray = np.moveaxis(np.asarray(mapped_elements(stored)), operand.axis, 0)
    return rows.reshape(len(rows), -1)
