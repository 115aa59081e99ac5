"""Attention that needs the last rows of its cache alone: what it computes from the scores on, for these rows.

The mask of a sliding window depends on the distance between query and key, so that of the last rows and the new tokens
is the mask of a text that has no others. An input that is given for all tokens so far is cut to these.
"""

from __future__ import annotations

import itertools
from collections.abc import Set as AbstractSet

import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite, CachedOperand
from kvsurgeon.analysis.token_data import is_token, token_inputs
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import producers, upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.symbolic.sequence_axes import Length


def windowed_nodes(flow: TokenFlow, site: AttentionSite) -> frozenset[ir.Node]:
    """Return the nodes of an attention from the scores to its output, which can be computed on the last rows.

    Raises:
        UnsupportedError: They read more than distances between tokens, or something else reads their results.
    """
    compares = any(score.compares for score in site.scores)
    if site.fused is not None or site.other_inputs or compares or not site.scores:
        raise _not_windowed(site.at, "products of queries with keys and of weights with values", str(site.at.name))
    between = (node for node in site.upstream_of_weights if is_token(flow, node.outputs[0]))
    nodes = {*(score.node for score in site.scores), *between, *site.ends}
    inner = [value for node in nodes - site.ends for value in node.outputs]
    read = next(
        (one for one in inner if one.is_graph_output() or any(user not in nodes for user, _ in one.uses())), None
    )
    if read is not None:
        raise _not_windowed(read, "scores and weights that only this attention reads", str(read.name))
    shifted = next((node for node in nodes if node in flow.diagonals), None)
    if shifted is not None:
        raise _not_windowed(shifted.outputs[0], "a mask of distances and padding", shifted.op_type)
    for operand in (*site.keys, *site.values):
        _check_path(flow, operand)
    _check_mask(flow, site, nodes)
    return frozenset(nodes)


def _check_mask(flow: TokenFlow, site: AttentionSite, nodes: AbstractSet[ir.Node]) -> None:
    """Check that scores meet nothing but context, which no input gives for the new tokens alone.

    Raises:
        UnsupportedError: They do: positions that are given count from the start of the text, not of the window.
    """
    products = {*(score.node for score in site.scores), *site.ends}
    read = [value for node in nodes - products for value in content_inputs(node)]
    lengths = {given.value: set(given.lengths.values()) for given in flow.inputs}
    tokens = (value for value in read if is_token(flow, value) and value.producer() not in nodes)
    context = upstream([one for one in read if flow.kinds.get(one) is ValueKind.CONTEXT], inputs=content_inputs)
    given = (value for value in context if lengths.get(value) == {Length.NEW})
    other = next(itertools.chain(tokens, given), None)
    if other is not None:
        raise _not_windowed(site.at, "a mask of distances and padding", str(other.name))


def _check_path(flow: TokenFlow, operand: CachedOperand) -> None:
    """Check that keys or values are not combined with context between cache and product.

    Raises:
        UnsupportedError: They are, as by a rotary embedding.
    """
    node, index = operand.place
    start = operand.cache_point.value
    walked = upstream([node.inputs[index]], stop=lambda one: one is start, inputs=lambda one: token_inputs(flow, one))
    for one in producers(value for value in walked if value is not start):
        place = next((place for place in range(len(one.inputs)) if flow.demands.get((one, place))), None)
        if place is not None:
            found = one.inputs[place]
            assert found is not None
            raise _not_windowed(one.outputs[0], "a cache behind the rotary embedding", found.name)


def _not_windowed(value: ir.Value, expected: str, found: str | None) -> UnsupportedError:
    return UnsupportedError(
        "attention cannot be computed on the last rows alone", code=Code.PASS_PRECONDITION, at=value.name,
        expected=expected, found=found,
    )  # fmt: skip
