"""Compute keys and values of later layers from an earlier input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.errors import UsageError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class SwiftKv:
    """Compute the keys and values of later layers from the attention input of one layer (SwiftKV, SingleInputKV).

    Before: each layer computes its keys and values from its own input. After: those behind layer `after` compute them
    from the attention input of that layer, with weights and biases that fit them best on a text (`--text FILE`). The
    cache is unchanged. Not exact: the report states the accuracy loss.

    The keys and values of a prompt then no longer depend on what the later layers compute.

    Not supported: quantized weights, keys or values without a projection or with several.

    Attributes:
        after: Index of the layer whose attention input is used.
    """

    name: ClassVar[str] = "swiftkv"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    after: int

    def apply(self, subject: Subject) -> Outcome:
        """Fit the keys and values of later layers.

        Raises:
            UsageError: There is no text, or no such layer.
            UnsupportedError: The weights of keys and values cannot be found.
        """
        text = subject.text_for("to fit keys and values on")
        from kvsurgeon.calibration import project_single_input  # onnxruntime is slow to import

        work = subject.with_model(subject.model)
        signature = detach_cache(work)
        analysis = work.analysis_of_copy()
        if not analysis.sites:
            return Unchanged(reason="the model has no attention")
        if not 0 <= self.after < len(analysis.sites):
            raise UsageError(f"expected a layer from 0 to {len(analysis.sites) - 1}, found {self.after}")
        with deep_recursion():
            edits, notes = project_single_input(analysis, self.after, text, subject.folder)
        if not edits:
            return Unchanged(reason=f"no layer behind layer {self.after} computes keys and values from another input")
        work.changed()
        fitted = copy_model(work.model)
        if signature is not None:
            reattach_cache(work, signature)
        subject.model = work.model
        return Changed(edits=edits, notes=notes, exact=False, equal_models=lambda: [(fitted, fitted)])
