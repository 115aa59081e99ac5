"""Row checks: compare rows of context at real lengths, near every threshold, with and without later tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.thresholds import bisect
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.proof.length_sweep import MIN_USEFUL_LENGTH

MAX_LENGTH_OF_PAIRS = 1 << 14  # tokens: in longer texts a run has one row instead of two
MAX_EXACT_LIMIT = 1 << 13  # tokens: a longer limit that no constant names is found to within a 256th
FEW_SPANS = 6  # of a total length at which a run is expensive
MAX_RUN = 1 << 23  # elements of one run
MAX_ELEMENTS = 1 << 28  # of all runs
MAX_RUNS = 600  # at all total lengths together
MAX_ELEMENTS_OF_BLOCKS = 1 << 27  # of those that compute every row that is not like the one before


def first_span(total: int) -> Rows:
    """Return as many rows as one run computes at a total length, from the first one."""
    return Rows(0, min(total, 2 if total <= MAX_LENGTH_OF_PAIRS else 1), total)


def affordable(totals: Sequence[int], elements: Callable[[Rows], int], *, any_length: bool = False) -> list[int]:
    """Return the total lengths at which a run is not too large; if any length will do, one at least."""
    found = [total for total in totals if elements(first_span(total)) <= MAX_RUN]
    if found or not any_length:
        return found
    total = min(totals)
    while total > MIN_USEFUL_LENGTH and elements(first_span(total)) > MAX_RUN:
        total //= 2
    return [total]


def spans(total: int, positions: Sequence[int], elements: Callable[[Rows], int], lengths: int = 1) -> Iterator[Rows]:
    """Yield the rows to check at a total length: the first, around some positions, in the middle and the last.

    Args:
        total: The total length in tokens.
        positions: Positions at which something may change; if they are too many, evenly spaced ones are taken.
        elements: Returns the number of elements that a run computes.
        lengths: Number of total lengths at which rows are checked: the cost of all is bounded.
    """
    first = first_span(total)
    most = max(FEW_SPANS, min(MAX_RUNS, MAX_ELEMENTS // max(1, elements(first))) // lengths)
    near = [place for place in positions if 0 < place < total - first.stop]
    near = near[:: max(1, -(-len(near) // most))]
    for start in list(dict.fromkeys([total - first.stop, total // 2, 0, *near]))[:most]:
        yield Rows(start, min(start + first.stop, total), total)


def blocks(positions: Sequence[int], total: int, elements: Callable[[Rows], int]) -> Iterator[Rows]:
    """Yield the rows of these positions at a total length; if they are too many, evenly spaced ones of them."""
    wanted, count = [place for place in positions if place < total], total
    while count > 1 and elements(Rows(0, count, total)) > MAX_RUN:
        count //= 2
    found: list[Rows] = []
    for place in wanted:
        last = found[-1] if found else None
        if last is not None and place == last.stop < last.start + count:
            found[-1] = Rows(last.start, place + 1, total)
        else:
            found.append(Rows(place, place + 1, total))
    cost = sum(elements(rows) for rows in found[:1]) * len(found)
    yield from found[:: max(1, -(-cost // MAX_ELEMENTS_OF_BLOCKS))]


def longest_passing(
    check: Callable[[int], None], totals: Sequence[int], passed: int
) -> tuple[int, UnsupportedError | None]:
    """Return the longest total length up to which a check passes, and the error of the next one if it fails.

    Args:
        check: Raises `UnsupportedError` at a total length at which the model is not what it must be.
        totals: Total lengths to check, ascending.
        passed: A total length at which the check is known to pass.

    Raises:
        UnsupportedError: The check fails below the minimum useful length.
    """
    passing = 1 if totals and totals[0] <= passed else passed
    for total in totals:
        try:
            check(total)
        except UnsupportedError as error:
            passing, failed = bisect(check, passing, total, error, _gap)
            if passing < MIN_USEFUL_LENGTH and failed.code is not Code.CONTEXT_NOT_RUNNABLE:
                raise failed from None
            return passing, failed
        passing = total
    return passing, None


def _gap(limit: int) -> int:
    return 1 if limit <= MAX_EXACT_LIMIT else limit // 256
