"""Give a model that has a cache another one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_removal import eject


@dataclass(frozen=True, kw_only=True)
class Retarget(Inject):
    """Give a model that has a cache another one: other names, another layout, another way of being kept.

    Before: a decoder with a cache of any form that `remove-cache` can take out. After: what `inject` with the same
    options makes of the decoder without it.

    Not handled: what `remove-cache` or `inject` does not handle.
    """

    name: ClassVar[str] = "retarget"

    def apply(self, subject: Subject) -> Outcome:
        """Move the cache of `subject.model` into the wanted form.

        Raises:
            UnsupportedError: The cache cannot be taken out, or none can be given soundly; the model is left as it was.
            UsageError: A template does not give each tensor a name of its own.
        """
        with deep_recursion():
            ejection = eject(subject.model)
            if ejection is None:
                return Unchanged(reason="it has no cache yet: inject gives it one")
            without = Subject(model=ejection.model, folder=subject.folder, config=subject.config)
            ejection.signature.located(without.analysis())
        outcome = super().apply(without)
        subject.model = without.model
        return outcome if isinstance(outcome, Unchanged) else replace(outcome, edits=ejection.edits + outcome.edits)
