"""Attention with other inputs: larger batches, and other numbers in inputs without tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.proof.attention.attention_pattern import is_attended
from kvsurgeon.proof.attention.attention_probe import AttentionProbe
from kvsurgeon.proof.batch_sizes import BATCHES
from kvsurgeon.proof.other_inputs import other_numbers
from kvsurgeon.proof.row_runner import RowRunner

_SHORT = 40  # tokens
_FEW = 6  # batch sizes; of more, only the largest is run in long texts
HAS_A_KEY = "inputs that are not given for each token leave every query a key"


def check_batches(probe: AttentionProbe, length: int) -> None:
    """Check that the sequences of larger batches are causal and prefix stable too: a mask may count sequences."""
    sizes = probe.sweep.batches
    length = min(length, _SHORT) if sizes == BATCHES else length  # a comparison may be combined with one of the length
    for batch in sizes:
        texts = {count: Rows(0, count, count, batch) for count in probe.sweep.with_half(length)}
        probe.check_lengths(
            {count: probe.compared(probe.runner.run(count, batch=batch), rows) for count, rows in texts.items()}
        )
    probe.sweep.check_batch_sizes()


def check_numbers(probe: AttentionProbe, length: int) -> None:
    """Check that attention is causal whatever inputs without tokens hold, such as a count of tokens.

    Queries that attend to no key, for which weights are NaN or equal, may depend on all of them: it is
    assumed that there are none.
    """
    half = length // 2
    for number in other_numbers(probe.sweep, probe.runner.masks, (half, length - 1, length)):
        try:
            longer, shorter = (probe.run(count, number=number)[0] for count in (length, half))
        except UnsupportedError:  # no row of a table has this index
            continue
        without_key = _attends_to_none(longer) & is_attended(np.nan_to_num(longer, nan=1.0))
        if without_key[..., :-1, :].any():
            at = next(given.value.name for given in probe.runner.masks if not given.lengths)
            probe.sweep.assumptions.setdefault(HAS_A_KEY, at or "")
        rows = half - 1  # the last query of a text may attend to all keys equally
        longer, shorter = (np.where(_attends_to_none(weights), 0.0, weights) for weights in (longer, shorter))
        probe.check_causal(longer)
        probe.check_stable(longer[..., :rows, :half], shorter[..., :rows, :])


def check_rows_with_other_inputs(probe: AttentionProbe, runner: RowRunner, rows: Rows) -> None:
    """Check rows of the weights of a long text as `check_batches` and `check_numbers` check those of short texts."""
    followed = Rows(rows.start, rows.stop, min(rows.stop + 1, rows.total))
    sizes = probe.sweep.batches
    for batch in sizes[-1:] if sizes == BATCHES or len(sizes) > _FEW else sizes:
        texts = [replace(one, batch=batch) for one in (rows, followed)]
        longer, shorter = (probe.compared(runner.run(one), one)[0] for one in texts)
        probe.check_causal(longer, rows.start)
        probe.check_stable(longer[..., : followed.total], shorter)
    for number in other_numbers(probe.sweep, probe.runner.masks, (rows.start, rows.total - 1, rows.total)):
        try:
            longer, shorter = (probe.compared(runner.run(one, number=number), one)[0] for one in (rows, followed))
        except UnsupportedError:
            continue
        longer, shorter = (np.where(_attends_to_none(weights), 0.0, weights) for weights in (longer, shorter))
        probe.check_causal(longer, rows.start)
        probe.check_stable(longer[..., : followed.total], shorter)


def _attends_to_none(weights: np.ndarray) -> np.ndarray:
    """Return [..., query, 1] of bool: whether the weights are NaN, or equal although the scores differ."""
    is_equal = np.ptp(weights, axis=-1, keepdims=True) == 0
    return np.asarray(np.isnan(weights).all(axis=-1, keepdims=True) | is_equal)
