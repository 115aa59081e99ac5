"""Conversion of exports of fixed length to any number of tokens up to that length."""

from __future__ import annotations

from kvsurgeon.graph.copies import copy_model
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.contract import Subject


def with_dynamic_length(subject: Subject) -> Subject:
    """Return a causal decoder of fixed length with calls of any length up to it; the subject is unchanged.

    What is made for all tokens of the fixed length, such as a table or the target of a `Reshape`, is then made for
    those of the call: a cache needs just that, and its first call is such a call.

    Raises:
        UnsupportedError: The model does not support a cache.
    """
    copy = subject.with_model(copy_model(subject.model))
    Inject().apply(copy)
    RemoveCache().apply(copy)
    return copy
