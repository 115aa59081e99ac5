"""Content masks: token data that meets the scores and may hide keys, such as `input_ids != 0`.

A query whose keys are all hidden may give weight to every key, later ones included. Which tokens a mask input hides is
up to the application; what a text contains is not, so attention must be causal whichever tokens hide their keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import MaskPattern, left_padded, with_gaps
from kvsurgeon.analysis.probe_feeds import Feed
from kvsurgeon.analysis.probe_inputs import Rows, at_length, run_dtype
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import is_token, upstream_tokens
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.query import producers
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.weights.mapped import mapped_elements

MIN_MASK = 1e3  # a smaller constant that is added to scores is a bias, not a mask
MAX_CONDITIONS = 6  # of one mask, of which every combination is computed
_MAX_TABLE = 1 << 24  # elements of a table that tokens index whose content is read


def hiding_feeds(
    flow: TokenFlow, site: AttentionSite, patterns: Sequence[MaskPattern] = (left_padded, with_gaps)
) -> Iterator[dict[str, Feed]]:
    """Yield feeds of the content masks of an attention, by name, in which tokens of each pattern hide their keys.

    Each pattern comes in both ways, because it is not known which of two numbers hides a key.
    """
    met = {value: None for node, index in site.other_inputs if (value := node.inputs[index]) is not None}
    masks = {value: numbers for value in met if (numbers := _numbers(flow, value))}
    for pattern, is_swapped in itertools.product(patterns if masks else (), (False, True)):
        yield {
            value.name or "": _hiding_feed(flow, value, pattern, numbers[::-1] if is_swapped else numbers)
            for value, numbers in masks.items()
        }


def _numbers(flow: TokenFlow, value: ir.Value) -> tuple[float, ...]:
    """Return the two numbers that a content mask holds for keys that it hides and for others; none if it is no mask."""
    tokens = list(upstream_tokens(flow, value))
    conditions = [token for token in tokens if flow.shapes[token].dtype is ir.DataType.BOOL]
    if conditions and (numbers := _numbers_of(flow, value, conditions)):
        return numbers
    constants = [
        float(np.abs(array).max(initial=0.0))
        for node in producers(tokens)
        for source in node.inputs
        if not is_token(flow, source)
        and (array := constant_content(node, source)) is not None
        and array.dtype.kind == "f"
    ]
    largest = sum(constants) if conditions else max(constants, default=0.0)
    return (-largest, 0.0) if largest >= MIN_MASK else ()


def constant_content(node: ir.Node, source: ir.Value | None) -> np.ndarray | None:
    """Return the content of a small constant, or of a table that a node reads: each token may hold a bias of its keys.

    None for others.
    """
    table = constant_tensor(source) if has_trait(node, Trait.LOOKUP) else None
    if table is None or table.dtype is ir.DataType.STRING or table.size > _MAX_TABLE:
        return small_constant(source)
    with suppress(OSError, ValueError):  # its file is missing
        return np.asarray(mapped_elements(table))
    return None


def _numbers_of(flow: TokenFlow, value: ir.Value, conditions: list[ir.Value]) -> tuple[float, ...]:
    """Return the least and the largest number of a value that is computed from conditions of tokens; () if of many."""
    runner, found = SubgraphRunner(flow, [value], probed=conditions), []
    feeds = {name: runner.feeds[name] for one in conditions if (name := one.name or "") in runner.feeds}
    if len(feeds) > MAX_CONDITIONS:
        return ()
    for truths in itertools.product((False, True), repeat=len(feeds)):
        for (name, feed), truth in zip(feeds.items(), truths, strict=True):
            runner.inputs.give(name, partial(_all, feed, truth))
        (array,) = runner.run(1)
        found += [float(array.min()), float(array.max())]
    return min(found), max(found)


def _all(feed: Feed, truth: bool, rows: Rows) -> np.ndarray:
    return np.full_like(feed(rows), truth)


def _hiding_feed(flow: TokenFlow, value: ir.Value, pattern: MaskPattern, numbers: tuple[float, ...]) -> Feed:
    """Return a feed that holds the first number for the tokens that a pattern masks, and the second for the others."""
    fact, (axis, *_) = flow.shapes[value], flow.axes[value]

    def feed(rows: Rows) -> np.ndarray:
        sizes, kept = rows.sizes(fact.shape or (), flow.axes[value]), pattern(rows.total)
        places = np.arange(sizes[axis.axis]) // int(at_length(axis.inner, rows.total)) % rows.total
        chosen = np.where(kept[places], numbers[1], numbers[0])
        shape = [size if place == axis.axis else 1 for place, size in enumerate(sizes)]
        return np.broadcast_to(chosen.reshape(shape), sizes).astype(run_dtype(fact.dtype or ir.DataType.FLOAT).numpy())

    return feed
