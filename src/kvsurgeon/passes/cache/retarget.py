"""Change the cache of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_removal import remove_cache


@dataclass(frozen=True, kw_only=True)
class Retarget(Inject):
    """Change the cache of a model: its names, cache mode, layout or element type.

    Before: a decoder with any cache that `remove-cache` removes. After: the result of `inject` with these options on
    the decoder without the cache.

    Not handled: what `remove-cache` or `inject` does not handle.
    """

    name: ClassVar[str] = "retarget"

    def apply(self, subject: Subject) -> Outcome:
        """Change the cache of `subject.model`.

        Raises:
            UnsupportedError: The cache cannot be removed, or the model does not support the new one; it is unchanged.
            UsageError: Two options exclude each other, or a name template does not give unique names.
        """
        with deep_recursion():
            removed = remove_cache(subject.model)
            if removed is None:
                return Unchanged(reason="the model has no cache: use inject")
            without_cache = subject.with_model(removed.model)
            removed.signature.located(without_cache.analysis())
        outcome = super().apply(without_cache)
        subject.model = without_cache.model
        return outcome if isinstance(outcome, Unchanged) else replace(outcome, edits=removed.edits + outcome.edits)
