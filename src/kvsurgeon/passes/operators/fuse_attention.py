"""Let one operator compute each attention, and keep its cache where the model has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.decompose import decompose
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.context import Setting
from kvsurgeon.fusion.match import Fusable, find_fusable
from kvsurgeon.fusion.numeric_check import Showing
from kvsurgeon.fusion.operators import OPERATORS, Name, Operator
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.remove_cache import put_back, take_out
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.proof.proof import prove
from kvsurgeon.rewrite.lengths import LengthValues, Source


@dataclass(frozen=True, kw_only=True)
class FuseAttention:
    """Let one operator compute each attention: faster where a runtime has a kernel for it, and what compilers look for.

    Before: products, a softmax and what stands between them. After: `GroupQueryAttention` of com.microsoft, which keeps
    the cache too and reads of a buffer only the rows so far, or `Attention` of opset 23. Masks, windows, biases and
    tables stay the graph's own: what they make of scores of zero is what the operator is told to add.

    Not handled: scores of several products, weights that are changed before they meet the values, sinks.

    Attributes:
        operator: Which.
        layers: Whether every attention must become one, or those do that can.
    """

    name: ClassVar[str] = "fuse-attention"

    operator: Name = "group-query-attention"
    layers: Literal["all", "possible"] = "all"

    def apply(self, subject: Subject) -> Outcome:
        """Fuse the attentions of `subject.model`.

        Raises:
            UnsupportedError: One computes what the operator does not; the model is left as it was.
        """
        operator = OPERATORS[self.operator]
        before = sum(map(operator.is_at, subject.model.graph))
        work = Subject(model=subject.model, folder=subject.folder, config=subject.config)
        signature = take_out(work)
        cached = signature is not None and self.operator == "group-query-attention"
        opset = work.model.graph.opset_imports.get("", 1)
        choice = _Choice(operator, opset=opset, every=self.layers == "all", cached=cached)
        if signature is not None and cached:
            outcome = put_back(work, signature, choice.choose)
        else:
            outcome = _without_cache(work, choice)
            if signature is not None:
                put_back(work, signature)
        if sum(map(operator.is_at, work.model.graph)) == before:
            return Unchanged(reason=f"every attention is one {operator.op_type} already")
        subject.model = work.model
        return replace(outcome, notes=(*outcome.notes, *choice.notes))


class _Choice:
    """Which attentions are fused, and why the others are not."""

    def __init__(self, operator: type[Operator], *, opset: int, every: bool, cached: bool) -> None:
        self.operator = operator
        self.cached = cached
        self.opset = opset
        self.every = every
        self.notes: list[str] = []

    def choose(self, analysis: Analysis) -> Sequence[Fusable]:
        """Return those that are what the operator computes, as running them has shown.

        Raises:
            UnsupportedError: One is not, and all must be; or none is.
        """
        found: list[Fusable] = []
        refusals: list[UnsupportedError] = []
        showing = Showing(analysis)
        for layer, head in enumerate(analysis.heads):
            if head.fused is not None and self.operator.is_at(head.fused.node):
                continue
            try:
                fusable = find_fusable(analysis, layer, cached=self.cached)
                self.operator.check(fusable, self.opset)
                showing.check(fusable)
            except UnsupportedError as refusal:
                refusals.append(refusal)
            else:
                found.append(fusable)
        if refusals and (self.every or not found):
            raise refusals[0]
        self.notes += [f"not fused: {refusal}" for refusal in refusals]
        return found


def _without_cache(subject: Subject, choice: _Choice) -> Changed:
    """Fuse the attentions of a model without a cache."""
    written = decompose(subject.model)
    with deep_recursion():
        analysis = analyze(written.model)
        prove(analysis)
        fusables = choice.choose(analysis)
        editor = Editor(written.model)
        operator = choice.operator(_setting(analysis, editor))
        for fusable in fusables:
            operator.finish(fusable, operator.place(fusable))
        editor.finish()
    subject.model = written.model
    return Changed(edits=editor.edits)


def _setting(analysis: Analysis, editor: Editor) -> Setting:
    """All tokens are new."""
    sources = {
        size: Source(value=given.value, axis=axis)
        for given in reversed(analysis.inputs)
        for axis, size in enumerate(given.dimensions)
        if not isinstance(size, int)
    }
    return Setting(
        flow=analysis.flow, editor=editor, lengths=LengthValues(editor, sources, total=analysis.length),
        new=analysis.length, so_far=analysis.length, before={node: tuple(node.inputs) for node in analysis.flow.order},
    )  # fmt: skip
