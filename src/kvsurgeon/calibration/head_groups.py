"""Groups of KV heads to merge: heads that are most alike, if query heads can change places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.graph.query import downstream

Groups = list[list[int]]


def neighbors(heads: int, count: int) -> Groups:
    """Return groups of neighboring heads."""
    return [part.tolist() for part in np.arange(heads).reshape(count, -1)]


def alike(heads: int, count: int, loss: Callable[[Sequence[int]], float]) -> Groups:
    """Return groups of equal size with a small loss in total: neighbors, improved by exchanging two heads at a time.

    Args:
        heads: Number of heads.
        count: Number of groups.
        loss: Returns the loss if two heads are merged.
    """
    groups = neighbors(heads, count)
    pairs = np.zeros((heads, heads))
    for first in range(heads):
        for second in range(first):
            pairs[first, second] = pairs[second, first] = loss((second, first))
    while True:
        of_head = {head: group for group in groups for head in group}
        gains = [
            (_gain(pairs, of_head[first], of_head[second], first, second), first, second)
            for first in range(heads)
            for second in range(first)
            if of_head[first] is not of_head[second]
        ]
        gain, first, second = max(gains, default=(0.0, 0, 0))
        if gain <= 1e-9:
            return [sorted(group) for group in groups]
        mine, theirs = of_head[first], of_head[second]
        mine[mine.index(first)], theirs[theirs.index(second)] = second, first


def _gain(pairs: np.ndarray, mine: Sequence[int], theirs: Sequence[int], first: int, second: int) -> float:
    """Return by how much the total loss falls if they exchange two heads."""
    own, others = [head for head in mine if head != first], [head for head in theirs if head != second]
    before = pairs[first, own].sum() + pairs[second, others].sum()
    return float(before - pairs[second, own].sum() - pairs[first, others].sum())


def heads_can_change_places(analysis: Analysis, layers: Sequence[int], heads: int) -> bool:
    """Return whether nothing between scores and weights of some layers is different for different query heads.

    A bias or a sink of each head, such as ALiBi, is; a mask that all heads share is not.
    """
    return all(_treats_heads_alike(analysis, analysis.sites[layer], heads) for layer in layers)


def _treats_heads_alike(analysis: Analysis, site: AttentionSite, heads: int) -> bool:
    flow, scores = analysis.flow, site.score_values

    def is_end(node: ir.Node) -> bool:
        return node in site.ends or not any(is_token(flow, value) for value in node.outputs)

    path = set(downstream(scores, stop=is_end))
    for value in path:
        shape, node = flow.shapes[value].shape or (), value.producer()
        if len(shape) != 4 or shape[1] != heads or node is None:
            return False
        others = [one for one in node.inputs if one is not None and one not in path] if value not in scores else []
        sizes = [flow.shapes[other].shape for other in others]
        if any(size is None or (len(size) > 2 and size[-3] != 1) for size in sizes):
            return False
    return bool(scores)


def moved_heads(reads: Sequence[int], slots: Sequence[int]) -> list[int]:
    """Return the new place of each query head if KV heads move to other slots, each with its query heads.

    Args:
        reads: For each query head the KV head that it reads.
        slots: For each KV head its new slot.
    """
    readers = {kv_head: [head for head, read in enumerate(reads) if read == kv_head] for kv_head in set(reads)}
    return [readers[slots[kv_head]][readers[kv_head].index(head)] for head, kv_head in enumerate(reads)]
