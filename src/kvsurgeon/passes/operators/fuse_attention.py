"""Replace each attention by one operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.fusion.context import FusionContext
from kvsurgeon.fusion.fuser import AttentionFuser
from kvsurgeon.fusion.match import FusionMatch, match_attention
from kvsurgeon.fusion.numeric_check import NumericCheck
from kvsurgeon.fusion.operator_mask import is_padding_counted, operator_mask
from kvsurgeon.fusion.operator_rotary import RotaryMatcher
from kvsurgeon.fusion.operators import OPERATORS, AttentionOperator, OperatorName
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.io.model_config import longest_text
from kvsurgeon.passes.cache.inject import SelectMatches
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count
from kvsurgeon.proof.attention.attention_pattern import AttentionPattern
from kvsurgeon.proof.proof import Proof
from kvsurgeon.resizing.lengths import LengthValues, sources_of


@dataclass(frozen=True, kw_only=True)
class FuseAttention:
    """Replace each attention by one operator, for which runtimes have fast kernels.

    Before: score product, mask, softmax and context product. After: `GroupQueryAttention` of com.microsoft, which also
    reads and writes the KV cache, or `Attention` of opset 23. Causal masks, sliding windows, attention sinks and the
    rotary embedding become the operator's own if it has them; other masks and position biases stay in the graph, and
    their result is the bias input of the operator.

    Not handled: scores of several products, weights that change between softmax and context product.

    Attributes:
        operator: Operator that replaces the attention.
        layers: Layers to fuse: all of them, or only those that the operator supports.
        padding: Where padding may be. mask: anywhere, as the mask says. lengths: behind the tokens of each sequence
            only, and positions count from 0, so that the operator needs their numbers alone.
        max_length: Longest text in tokens for which rotary angles are tabulated; by default that of config.json.
    """

    name: ClassVar[str] = "fuse-attention"

    operator: OperatorName = "group-query-attention"
    layers: Literal["all", "supported"] = "all"
    padding: Literal["mask", "lengths"] = "mask"
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_count("max-length", self.max_length)

    def apply(self, subject: Subject) -> Outcome:
        """Fuse the attention layers of `subject.model`.

        Raises:
            UnsupportedError: The operator does not support a layer; the model is unchanged.
        """
        operator = OPERATORS[self.operator]
        before = sum(map(operator.is_at, subject.model.graph))
        work = subject.with_model(subject.model)
        signature = detach_cache(work)
        cached = signature is not None and operator.keeps_cache
        notes: list[str] = []

        def select(analysis: Analysis, proof: Proof) -> Sequence[FusionMatch]:
            matches, errors = self._match_all(analysis, proof, subject, cached=cached)
            if errors and (self.layers == "all" or not matches):
                raise errors[0]
            notes[:] = [f"not fused: {error}" for error in errors]
            return matches

        if signature is not None and cached:
            outcome = reattach_cache(work, signature, select, padding=self.padding)
        else:
            outcome = _fuse(work, operator, select)
            if signature is not None:
                reattach_cache(work, signature)
        if sum(map(operator.is_at, work.model.graph)) == before:
            return Unchanged(reason=f"every attention layer already is a {operator.op_type} operator")
        subject.model = work.model
        return replace(outcome, notes=(*outcome.notes, *notes))

    def _match_all(
        self, analysis: Analysis, proof: Proof, subject: Subject, *, cached: bool
    ) -> tuple[list[FusionMatch], list[UnsupportedError]]:
        """Return the matches of all layers that are not yet fused, and the errors of those that do not match."""
        matches: list[FusionMatch] = []
        errors: list[UnsupportedError] = []
        operator, opset = OPERATORS[self.operator], subject.model.graph.opset_imports.get("", 1)
        numeric = NumericCheck(analysis, proof)
        by_lengths = self.padding == "lengths" and is_padding_counted(analysis.inputs)
        rotary = self._rotary(analysis, proof, subject, by_lengths=by_lengths) if cached else None
        for layer, site in enumerate(analysis.sites):
            if site.fused is not None and operator.is_at(site.fused.node):
                continue
            try:
                match = match_attention(analysis, layer, cached=cached)
                operator.check(match, opset)
                numeric.check(match)
                _check_causal(operator, proof.patterns[layer], match)
            except UnsupportedError as error:
                errors.append(error)
                continue
            if operator.keeps_cache:
                mask = operator_mask(proof.patterns[layer])
                own = mask if mask is not None and (by_lengths or not mask.maskable) else None
                rotation = None if rotary is None else rotary.match(match.query, match.key)
                match = replace(match, mask=own, rotary=rotation if rotation and operator.rotates(rotation) else None)
            matches.append(match)
        return matches, errors

    def _rotary(self, analysis: Analysis, proof: Proof, subject: Subject, *, by_lengths: bool) -> RotaryMatcher | None:
        """Return what finds rotary embeddings that the operator can compute; None if the longest text is unknown."""
        lengths = (self.max_length or longest_text(subject.config or {}), proof.limit, proof.max_length)
        longest = min((length for length in lengths if length is not None), default=None)
        if longest is None:
            return None
        return RotaryMatcher(flow=analysis.flow, same=analysis.same, positions=longest, by_lengths=by_lengths)


def _check_causal(operator: AttentionOperator, pattern: AttentionPattern, match: FusionMatch) -> None:
    """Check that an operator which is always causal replaces no attention that is not in the first call.

    Raises:
        UnsupportedError: It would.
    """
    if operator.keeps_cache and pattern.opens_block:
        raise UnsupportedError(
            f"{operator.op_type} is always causal, and tokens of the first call may attend to later ones",
            code=Code.NOT_FUSABLE, layer=match.layer, at=match.site.at.name,
        )  # fmt: skip


def _fuse(subject: Subject, operator: AttentionOperator, select: SelectMatches) -> Changed:
    """Fuse the attention layers of a model without a cache."""
    with deep_recursion():
        analysis, proof = subject.analysis(), subject.proof()
        subject.changed()  # the analysis refers to the graph that is edited below
        matches = select(analysis, proof)
        editor = Editor(analysis.model)
        fuser = AttentionFuser(operator, _context(analysis, editor))
        for match in matches:
            fuser.place(match)
            fuser.finish()
        editor.finish()
    subject.model = analysis.model
    return Changed(edits=editor.edits)


def _context(analysis: Analysis, editor: Editor) -> FusionContext:
    """Return the context of a model without a cache, where S is T."""
    sources = sources_of({given.value: given.dimensions for given in analysis.inputs})
    return FusionContext(
        flow=analysis.flow, editor=editor, lengths=LengthValues(editor, sources, total=analysis.length),
        sequence=analysis.length, total=analysis.length,
        before={node: tuple(node.inputs) for node in analysis.flow.order},
    )  # fmt: skip
