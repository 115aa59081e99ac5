"""Blocks of the first call: tokens that an input lets attend to later ones, which must be in the same call.

While such an input is 0, attention must be causal. In a text that it opens up to token `end`, queries from there on
must attend to no later key, and those before to no key from there on. Then the first call computes what the whole text
does if it has these tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import left_padded, with_gaps
from kvsurgeon.analysis.probe_feeds import ProbeFeeds
from kvsurgeon.analysis.probe_inputs import Rows, block_input
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import downstream
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.proof.attention.attention_pattern import is_attended
from kvsurgeon.proof.attention.attention_probe import AttentionProbe
from kvsurgeon.proof.length_sweep import LengthSweep
from kvsurgeon.proof.row_runner import RowRunner

_SHORTEST = 5  # tokens of a text in which there is something to open


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Numbers that inputs hold for the tokens of the first call, [end]."""

    numbers: np.ndarray

    @property
    def end(self) -> int:
        """Number of tokens of the first call."""
        return len(self.numbers)

    def without(self, weights: np.ndarray, first_query: int = 0) -> np.ndarray:
        """Return weights [..., query, key] without those of the first call on itself."""
        queries = max(0, self.end - first_query)
        others = weights.copy()
        others[..., :queries, : self.end] = 0.0
        return others


def check_readers(sweep: LengthSweep, attention: set[ir.Node]) -> None:
    """Check that nothing but attention masks is computed from inputs that open a block.

    Raises:
        UnsupportedError: Something else is.
    """
    opening = [given.value for given in sweep.flow.inputs if given.opens_block]
    fused = {site.fused.node for site in sweep.analysis.sites if site.fused is not None}

    def stop(node: ir.Node) -> bool:
        return any(is_token(sweep.flow, value) for value in node.outputs)

    for value in downstream(opening, stop=lambda node: stop(node) or is_shape_only(node)):
        for node, _ in value.uses():
            if stop(node) and not is_shape_only(node) and node not in attention and node not in fused:
                raise UnsupportedError(
                    "an input that opens a block in the first call is read outside attention masks",
                    code=Code.NOT_CAUSAL, at=node.outputs[0].name, expected="a mask of attention scores",
                    found=node.op_type,
                )  # fmt: skip


def check_first_call(probe: AttentionProbe, lengths: Sequence[int]) -> bool:
    """Check the weights of texts with a block in the first call, at lengths at which all rows are computed.

    Returns:
        Whether an input opens one.

    Raises:
        UnsupportedError: The block is open to other calls, or the weights depend on the total length.
    """
    opening = _opening(probe, probe.runner.inputs)
    if not opening:
        return False
    if probe.others or probe.sweep.fixed is not None:
        reason = "a block in the first call is checked for weights alone, at several lengths"
        raise probe.unsupported(reason, Code.NOT_CAUSAL, hint="export with a dynamic length")
    usable = sorted(length for length in lengths if length >= _SHORTEST)
    scales = (1.0, probe.largest_scale(max(usable)))
    for block in (*_blocks(usable), *_blocks_of_numbers(probe, max(usable))):
        with _opened(probe.runner.inputs, opening, block):
            for scale in scales:
                _check_weights(probe, block, usable, scale)
            for mask in (left_padded, with_gaps) if probe.runner.masks else ():
                visible = mask(max(usable))
                weights = probe.run(max(usable), mask)[0][..., visible, :]
                if is_attended(weights[..., ~visible]).any():
                    raise probe.unsupported("a block in the first call attends to masked tokens", Code.PADDING_LEAK, "")
    return True


def _check_weights(probe: AttentionProbe, block: _Block, lengths: Sequence[int], scale: float) -> None:
    found = {length: probe.run(length, scale=scale)[0] for length in lengths if length >= block.end}
    longest = found[max(found)]
    for length, weights in found.items():
        probe.check_causal(block.without(weights))
        probe.check_stable(longest[..., :length, :length], weights)


def check_first_call_rows(
    probe: AttentionProbe, runner: RowRunner, spans: Sequence[Rows], scales: Sequence[float]
) -> None:
    """Check rows of the weights of a long text with a block in the first call.

    Raises:
        UnsupportedError: The block is open to other calls, or the weights depend on the total length.
    """
    opening = _opening(probe, runner.inputs)
    for rows in spans if opening else ():
        for end in sorted({rows.start, rows.stop, rows.total // 2} - {0}):
            block = _Block(numbers=np.ones(end))
            alone = Rows(rows.start, rows.stop, max(rows.stop, end))
            with _opened(runner.inputs, opening, block):
                for scale in scales:
                    weights, same = (probe.compared(runner.run(one, scale=scale), one)[0] for one in (rows, alone))
                    probe.check_causal(block.without(weights, rows.start), rows.start)
                    probe.check_stable(weights[..., : alone.total], same)


def _opening(probe: AttentionProbe, inputs: ProbeFeeds) -> list[InputRole]:
    """Return the inputs that open a block and that these weights depend on."""
    return [given for given in probe.sweep.flow.inputs if given.opens_block and given.value.name in inputs.feeds]


@contextmanager
def _opened(inputs: ProbeFeeds, opening: Sequence[InputRole], block: _Block) -> Iterator[None]:
    """Feed the inputs with a block inside the `with` statement."""
    before = {name: inputs.feeds[name] for given in opening if (name := given.value.name or "")}
    for given in opening:
        feed = partial(block_input, given, block.end, numbers=block.numbers)
        inputs.give(given.value.name or "", feed)
    try:
        yield
    finally:
        for name, feed_before in before.items():
            inputs.give(name, feed_before)


def _blocks_of_numbers(probe: AttentionProbe, length: int) -> Iterator[_Block]:
    """Yield blocks of every number that context is compared with."""
    for number in sorted({number + step for number in (2, *probe.sweep.numbers) for step in (0, 1)}):
        yield _Block(numbers=np.full(length // 2, number))


def _blocks(lengths: Sequence[int]) -> Iterator[_Block]:
    """Yield blocks of several lengths, whole and in parts, with one number or several."""
    random = np.random.default_rng(0)
    for length in lengths:
        for end in sorted({2, length // 2, length - 1, length}):
            tokens = np.arange(end)
            yield _Block(numbers=np.ones(end))
            yield _Block(numbers=1.0 * (tokens >= end // 2))
            yield _Block(numbers=1.0 * (tokens != end // 2))
            yield _Block(numbers=1.0 + tokens % 2)
            yield _Block(numbers=random.integers(0, 3, end).astype(float))
