"""Merge groups of KV heads into their principal components, in the weights of the projections around attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.calibration.head_groups import alike, heads_can_change_places, neighbors
from kvsurgeon.calibration.head_maps import HeadMap, head_columns
from kvsurgeon.calibration.low_rank import LowRankMap, low_rank_map
from kvsurgeon.calibration.moments import SecondMoment
from kvsurgeon.calibration.readers import OutputProjection, QueryProjection, complex_factor, mapped_heads
from kvsurgeon.calibration.shared_heads import SharedHeads, find_shared_heads
from kvsurgeon.calibration.token_features import token_features
from kvsurgeon.calibration.weight_products import (
    FeatureChange,
    WeightProduct,
    change_features,
    check_readers,
    product_above,
)
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.heads.index_trace import IndexTrace

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

    Heads that are most alike become neighbors, each with its query heads, if nothing else differs between query heads.
    Afterwards the model is right only if the query heads of a group of neighbors read its first head. Keys
    that pass a norm or something else that is not linear are averaged instead, and so are such values; of those whose
    heads are normed together, the first one is kept.

    Args:
        analysis: The model, whose weights are replaced.
        kv_heads: Number of groups in each layer that has more KV heads.
        text: The text, on whose first half the model is run.
        folder: Folder of the model.

    Returns:
        Notes about what was not merged by components.

    Raises:
        UnsupportedError: The weights cannot be found, or both keys and values cannot be merged.
    """
    trace = IndexTrace(analysis.flow)
    found = [one for one in find_shared_heads(analysis) if one.kv_heads > kv_heads]
    changes: Changes = []
    others = Reasons()
    for batch in _batches(found):
        for one, moments in _measure(analysis, batch, text, folder):
            groups = _groups(analysis, trace, one, kv_heads, moments)
            try:
                changes += _merged_keys(trace, one, groups, moments) + _merged_values(trace, one, groups, moments)
            except UnsupportedError:
                changes += _merged_separately(trace, one, neighbors(one.kv_heads, kv_heads), moments, others)
    apply_changes(analysis.model, changes)
    return others.notes()


def _groups(
    analysis: Analysis, trace: IndexTrace, one: SharedHeads, kv_heads: int, moments: _Moments
) -> list[list[int]]:
    """Return the heads that are most alike if query heads can change places, else neighbors."""
    if kv_heads == 1 or not heads_can_change_places(analysis, one.layers, len(one.reads)):
        return neighbors(one.kv_heads, kv_heads)
    try:
        planes = mapped_heads(trace, one, one.keys, one.kv_heads)[1].planes
        weights = _weights_of_values(one, [OutputProjection.of(trace, one, context) for context in one.contexts])
    except UnsupportedError:
        return neighbors(one.kv_heads, kv_heads)

    def loss(group: Sequence[int]) -> float:
        _, _, of_keys = _key_components(planes, group, moments, one.head_dim)
        return of_keys + _value_components(one, group, moments, weights).loss

    return alike(one.kv_heads, kv_heads, loss)


def _merged_separately(
    trace: IndexTrace, one: SharedHeads, groups: Groups, moments: _Moments, others: Reasons
) -> Changes:
    """Return the changes that merge keys and values by components as far as possible, and otherwise simply.

    Raises:
        UnsupportedError: Neither can be merged by components.
    """
    changes: Changes = []
    failed = False
    for part, merged in (("keys", _merged_keys), ("values", _merged_values)):
        try:
            changes += merged(trace, one, groups, moments)
        except UnsupportedError as error:
            if error.code is Code.CANNOT_AVERAGE or failed:
                raise
            failed = True
            method, own = _simply_merged(trace, one, part, groups)
            changes += own
            others.add(f"{part} are merged by method={method}", error)
    return changes


@dataclass(kw_only=True)
class Reasons:
    """The reasons for which layers are handled in a simpler way, each with the first error and the number of layers."""

    found: dict[str, tuple[UnsupportedError, int]] = field(default_factory=dict)

    def add(self, what: str, error: UnsupportedError) -> None:
        """Add what is done in a layer because of an error."""
        key = f"{what}: {error.reason}"
        first, count = self.found.get(key, (error, 0))
        self.found[key] = first, count + 1

    def notes(self) -> tuple[str, ...]:
        """Return a note for each reason."""
        return tuple(
            f"{key}, first at `{error.at}` ({count} layer{'s' * (count > 1)})"
            for key, (error, count) in self.found.items()
        )


def apply_changes(model: ir.Model, changes: Changes) -> None:
    """Change the weights of projections.

    Raises:
        UnsupportedError: A feature of a product would be changed for two purposes, such as keys that are the values.
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
    editor = Editor(model)
    for product, change in changes:
        change_features(editor, product, change)
    editor.finish()


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
    values = [value for one in batch for value in (one.keys, one.values, *one.queries)]
    for features in token_features(analysis, values, text, folder):
        for one, moment in zip(batch, moments, strict=True):
            moment.keys.add(features[one.keys])
            moment.values.add(features[one.values])
            for query in one.queries:
                heads = features[query].reshape(-1, len(one.reads), one.head_dim)
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
    product, keys = mapped_heads(trace, one, one.keys, one.kv_heads)
    readers = [QueryProjection.of(trace, one, value) for value in one.queries]
    planes = keys.planes
    if any(set(reader.heads.planes) != set(planes) for reader in readers) or max(map(len, planes)) > 2:
        raise UnsupportedError(
            "keys and queries are rotated in different ways", code=Code.UNTRACEABLE_HEADS, at=one.keys.name,
            expected="pairs of features", found=f"{len(planes)} sets of up to {max(map(len, planes))} features",
        )  # fmt: skip
    own: list[FeatureChange] = []
    others: list[list[FeatureChange]] = [[] for _ in readers]
    slots = _slots(groups)
    for group in groups:
        encoders, decoders, _ = _key_components(planes, group, moments, one.head_dim)
        own.append(_into_slot(keys, group, slots[group[0]], encoders))
        for reader, change in zip(readers, others, strict=True):
            change += reader.changed(dict(zip(group, decoders, strict=True)), slots)
    return [(product, own), *((reader.product, change) for reader, change in zip(readers, others, strict=True))]


def _slots(groups: Groups) -> list[int]:
    """Return the place of each KV head if the heads of each group are neighbors."""
    slots = [0] * sum(map(len, groups))
    for place, head in enumerate(head for group in groups for head in group):
        slots[head] = place
    return slots


def _key_components(
    planes: Sequence[tuple[int, ...]], group: Sequence[int], moments: _Moments, size: int
) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Return for each head of a group the matrix into the merged head, and the one back; and the mean share lost.

    A rotation of two features is the product with a complex number: such factors commute with a rotary embedding.
    """
    encoders, decoders = ([np.zeros((size, size)) for _ in group] for _ in range(2))
    losses: list[float] = []
    heads = len(moments.keys.total) // size
    total = moments.keys.total.reshape(heads, size, heads, size)
    for first, second in (plane for plane in planes if len(plane) == 2):
        straight = total[np.ix_(group, [first], group, [first])] + total[np.ix_(group, [second], group, [second])]
        crossed = total[np.ix_(group, [second], group, [first])] - total[np.ix_(group, [first], group, [second])]
        moment = (straight + 1j * crossed).reshape(len(group), len(group))
        queries = [moments.queries[head].total for head in group]
        weights = [np.array([[one[first, first] + one[second, second]]]) for one in queries]
        found = low_rank_map(moment, weights, 1)
        losses.append(found.loss)
        for place in range(len(group)):
            complex_factor(encoders[place], first, second, found.encode[0, place])
            complex_factor(decoders[place], first, second, found.decode[place, 0])
    plain = [plane[0] for plane in planes if len(plane) == 1]
    if plain:
        weights = [moments.queries[head].total[np.ix_(plain, plain)] for head in group]
        block = total[np.ix_(group, plain, group, plain)].reshape(len(group) * len(plain), -1)
        found = low_rank_map(block, weights, len(plain))
        losses.append(found.loss)
        for place in range(len(group)):
            part = slice(place * len(plain), (place + 1) * len(plain))
            encoders[place][np.ix_(plain, plain)] = found.encode[:, part]
            decoders[place][np.ix_(plain, plain)] = found.decode[part]
    return encoders, decoders, float(np.mean(losses))


def _merged_values(trace: IndexTrace, one: SharedHeads, groups: Groups, moments: _Moments) -> Changes:
    """Return the changes that merge values, and those of the output projections.

    Raises:
        UnsupportedError: Values are not linear in their projection, or something else than a projection reads the
            result of the attention.
    """
    product, values = mapped_heads(trace, one, one.values, one.kv_heads)
    readers = [OutputProjection.of(trace, one, context) for context in one.contexts]
    weights, slots = _weights_of_values(one, readers), _slots(groups)
    own: list[FeatureChange] = []
    others: list[list[FeatureChange]] = [[] for _ in readers]
    for group in groups:
        found = _value_components(one, group, moments, weights)
        own.append(_into_slot(values, group, slots[group[0]], np.split(found.encode, len(group), axis=1)))
        decoders = np.split(found.decode, len(group), axis=0)
        for reader, change in zip(readers, others, strict=True):
            change += reader.changed(dict(zip(group, decoders, strict=True)), slots)
    return [(product, own), *((reader.product, change) for reader, change in zip(readers, others, strict=True))]


def _weights_of_values(one: SharedHeads, readers: Sequence[OutputProjection]) -> list[np.ndarray]:
    """Return for each KV head how much output projections read of its values, `[value_dim, value_dim]`."""
    parts = zip(*(reader.weights(one.kv_heads) for reader in readers), strict=True)
    return [np.asarray(sum(part)) for part in parts]


def _value_components(
    one: SharedHeads, group: Sequence[int], moments: _Moments, weights: Sequence[np.ndarray]
) -> LowRankMap:
    """Return the map from the values of a group to a merged head."""
    size, heads = one.value_dim, one.kv_heads
    total = moments.values.total.reshape(heads, size, heads, size)
    block = total[np.ix_(group, range(size), group, range(size))].reshape(len(group) * size, -1)
    return low_rank_map(block, [weights[head] for head in group], size)


def _into_slot(heads: HeadMap, group: Sequence[int], slot: int, encoders: Sequence[np.ndarray]) -> FeatureChange:
    """Return the change that makes the head of a slot the sum of a group, each encoded."""
    matrices = [heads.on_columns(encoder).T for encoder in encoders]
    source = np.concatenate([heads.columns[head] for head in group])
    return FeatureChange(target=heads.columns[slot], source=source, matrix=np.concatenate(matrices))


def _simply_merged(trace: IndexTrace, one: SharedHeads, part: str, groups: Groups) -> tuple[str, Changes]:
    """Return the changes that average heads; none, which leaves the first of a group, if their columns are unknown."""
    try:
        return "mean", _averaged(trace, one, part, groups)
    except UnsupportedError:
        return "first", []


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
