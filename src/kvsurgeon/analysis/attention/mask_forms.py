"""Mask forms: which numbers hide a key in each mask that the caller gives, found by running the masks.

A mask may hold 1 for each key that is attended to, or for each that is not, or numbers that are added to the scores.
The form of a mask is the one in which it hides masked keys, and later ones if it has an axis of queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention.attention_weights import ReadWeights, weights_of_mask, weights_of_product
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import unmasked, with_gaps
from kvsurgeon.analysis.probe_inputs import Rows, block_input
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole, MaskForm
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.content import content_inputs

LENGTH = 12  # tokens, of which some are masked
MANY = float(1 << 16)  # a count of tokens that hides none
_VISIBLE = 1e-6  # smaller weights count as 0


def with_mask_forms(flow: TokenFlow, sites: Iterable[AttentionSite]) -> list[InputRole]:
    """Return the roles of the inputs, with the form of each mask that an attention reads.

    A mask that hides keys in none of the forms keeps its usual one.
    """
    settled: dict[ir.Value, InputRole] = {}
    inputs = {given.value for given in flow.inputs}
    for site in sites:
        values, read = _weights(flow, site)
        if not values:
            continue
        probed, stops = ((), ()) if site.fused is not None else (site.weight_sources, site.ends)
        read_inputs = inputs.intersection(upstream(values, stop=frozenset(probed).__contains__, inputs=content_inputs))
        if read_inputs and read_inputs <= settled.keys():
            continue
        try:
            runner = SubgraphRunner(flow, values, probed=probed, stops=stops)
        except UnsupportedError:  # the proof says why
            continue
        settled |= {given.value: given for given in _closed_blocks(flow, runner, read) if given.value not in settled}
        if any(given.value not in settled for given in runner.masks):
            settled |= {given.value: given for given in _settle(runner, read, settled)}
    return [settled.get(given.value, given) for given in flow.inputs]


def _weights(flow: TokenFlow, site: AttentionSite) -> tuple[tuple[ir.Value, ...], ReadWeights]:
    if site.fused is not None:
        values, read, _ = weights_of_mask(flow, site)
        return values, read
    return weights_of_product(flow, site.products[0])


def _closed_blocks(flow: TokenFlow, runner: SubgraphRunner, read: ReadWeights) -> Iterator[InputRole]:
    """Yield the inputs that open a block, with the number at which none is open; it is fed from then on."""
    for given in flow.inputs:
        name = given.value.name or ""
        if not given.opens_block or name not in runner.feeds:
            continue
        for number in (0.0, 1.0) if given.lengths else (0.0,):
            role = replace(given, number=number)
            runner.inputs.give(name, partial(block_input, role, 0))
            try:
                closes = _hides(read(runner.run(LENGTH), Rows.of_text(LENGTH)), unmasked(LENGTH))
            except UnsupportedError:
                continue
            if closes:
                break
        yield role


def _settle(runner: SubgraphRunner, read: ReadWeights, settled: dict[ir.Value, InputRole]) -> Sequence[InputRole]:
    """Return the masks that weights depend on, in the first forms in which they hide what they must."""
    masks = list(runner.masks)
    choices = [[settled[given.value]] if given.value in settled else list(_forms(given)) for given in masks]
    for forms in product(*choices):
        runner.masks[:] = forms
        try:
            weights = read(runner.run(LENGTH, with_gaps), Rows.of_text(LENGTH))
        except UnsupportedError:
            continue
        if _hides(weights, with_gaps(LENGTH)):
            return forms
    return masks


def _forms(given: InputRole) -> Iterator[InputRole]:
    """Yield the forms that a mask may have, the usual one first; of an input without tokens, counts of tokens."""
    if not given.lengths:
        yield from (replace(given, number=number) for number in (given.number, MANY))
        return
    yield given
    is_floating = given.value.dtype is not None and given.value.dtype.is_floating_point()
    for form in MaskForm:
        if form is not given.mask_form and (is_floating or form is not MaskForm.ADDED):
            yield replace(given, mask_form=form)


def _hides(weights: np.ndarray, visible: np.ndarray) -> bool:
    """Return whether visible queries attend to themselves, and to no masked and no later key."""
    rows = np.abs(weights[..., visible, :]) > _VISIBLE
    is_later = np.triu(np.ones((len(visible), len(visible)), dtype=bool), 1)[visible]
    itself = rows[..., np.arange(visible.sum()), np.flatnonzero(visible)]
    return bool(
        not np.isnan(weights[..., visible, :]).any() and itself.all() and not rows[..., is_later | ~visible].any()
    )
