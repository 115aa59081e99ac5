"""Decoders in which the content of tokens, or scores beyond a number, open or hide keys.

A kind is a pair of changes of the scores or of the causal mask: after the adversarial one, some texts have a query that
attends to a later key; the other has the same operators, and later keys stay closed in every text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from adversarial_models.decoder import ORDINARY_TOKENS, Context, Design
from adversarial_models.draft import Draft

HIDING = 40  # tokens below hide their keys
EQUAL_PRODUCT = 1800  # of two ordinary tokens, in several ways
ROWS = 5000  # of a table of biases by token, too large for a small constant
Change = Callable[[Context, str], str]


@dataclass(frozen=True, kw_only=True)
class ContentKind:
    """A change that reads the content of tokens, and its benign counterpart."""

    name: str
    adversarial: Change
    benign: Change
    place: str = "scores"


def draw_content_kind(random: Random, kind: ContentKind, design: Design, *, benign: bool) -> Draft:
    """Return a decoder with keys that content opens or hides."""
    write_change = kind.benign if benign else kind.adversarial
    design = replace(design, changes={kind.place: write_change})
    return Draft(design=design, place=kind.place, threshold=None, variant=write_change.__name__.strip("_"))


def _of_keys(context: Context, value: str) -> str:
    """Return a value of tokens, [B, S], as one of keys, [B, 1, 1, S]."""
    return str(context.write("Unsqueeze", value, [1, 2]))


def _with_table(context: Context, scores: str, bias: float) -> str:
    table = np.zeros(ROWS, np.float32)
    table[:HIDING] = bias
    biases = context.write("Gather", context.write.weight(table), "input_ids")
    return str(context.write("Add", scores, _of_keys(context, biases)))


def _hiding_table(context: Context, scores: str) -> str:
    """Hide keys as a mask does: a query without another key attends to all of them equally, later ones included."""
    return _with_table(context, scores, -1e9)


def _small_table(context: Context, scores: str) -> str:
    return _with_table(context, scores, -3.0)


def _with_band(context: Context, scores: str, bias: float) -> str:
    """Add a bias to keys of which one condition is true and another is not."""
    write = context.write
    inner = write("Where", write("Less", "input_ids", 5), 0.0, bias)
    biases = write("Where", write("Less", "input_ids", HIDING), inner, 0.0)
    return str(write("Add", scores, _of_keys(context, biases)))


def _hiding_band(context: Context, scores: str) -> str:
    return _with_band(context, scores, -1e9)


def _small_band(context: Context, scores: str) -> str:
    return _with_band(context, scores, -3.0)


def _large_product(context: Context) -> str:
    """Return which pairs of tokens have a large product of their numbers, [B, 1, S, S]."""
    write = context.write
    product = write("Mul", write("Unsqueeze", "input_ids", [1, 3]), _of_keys(context, "input_ids"))
    return str(write("Greater", product, ORDINARY_TOKENS * 75))


def _product_open(context: Context, causal: str) -> str:
    return str(context.write("Or", causal, _large_product(context)))


def _product_apart(context: Context, causal: str) -> str:
    write = context.write
    own = write("Equal", context.query_positions, context.key_positions)
    return str(write("And", causal, write("Or", own, write("Not", _large_product(context)))))


def _equal_product(context: Context) -> str:
    """Return which pairs of tokens have one product of their numbers, [B, 1, S, S]."""
    write = context.write
    product = write("Mul", write("Unsqueeze", "input_ids", [1, 3]), _of_keys(context, "input_ids"))
    return str(write("Equal", product, EQUAL_PRODUCT))


def _equal_product_open(context: Context, causal: str) -> str:
    return str(context.write("Or", causal, _equal_product(context)))


def _equal_product_apart(context: Context, causal: str) -> str:
    write = context.write
    own = write("Equal", context.query_positions, context.key_positions)
    return str(write("And", causal, write("Or", own, write("Not", _equal_product(context)))))


def _score_open(context: Context, scores: str) -> str:
    """Lift scores beyond a number over any mask; only a query of large embeddings has such scores."""
    write = context.write
    large = write("Mul", scores, 40.0)
    return str(write("Where", write("Greater", large, 200.0), write("Add", scores, 1e10), scores))


def _score_with_ceiling(context: Context, scores: str) -> str:
    write = context.write
    large = write("Mul", scores, 40.0)
    return str(write("Mul", write("Where", write("Greater", large, 200.0), 200.0, large), 1 / 40))


KINDS: Mapping[str, ContentKind] = {
    kind.name: kind
    for kind in (
        ContentKind(name="table", adversarial=_hiding_table, benign=_small_table),
        ContentKind(name="two-conditions", adversarial=_hiding_band, benign=_small_band),
        ContentKind(name="product", adversarial=_product_open, benign=_product_apart, place="allowed"),
        ContentKind(
            name="equal-product", adversarial=_equal_product_open, benign=_equal_product_apart, place="allowed"
        ),
        ContentKind(name="score", adversarial=_score_open, benign=_score_with_ceiling),
    )
}
