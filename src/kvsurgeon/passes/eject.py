"""Take the cache out of a model, and put one back under the names that it had."""

from __future__ import annotations

from collections.abc import Collection, MutableSequence, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon import cache
from kvsurgeon.cache.signature import CANONICAL_AXIS, CacheEntry, CacheSignature
from kvsurgeon.errors import Refused
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import room_for_deep_graphs
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.idioms.note import write_note
from kvsurgeon.passes.idioms.plan import PAST_LENGTH, Count
from kvsurgeon.passes.inject import Choice, Inject, inject
from kvsurgeon.sequence.analysis import analyse
from kvsurgeon.sequence.written_out import in_standard_operators


@dataclass(frozen=True, kw_only=True)
class Eject:
    """Take past inputs and present outputs out, so that the model computes whole texts, as before it had a cache.

    Before: `input_ids`, masks for all tokens so far and pasts give `logits` and presents. After: `input_ids [batch,
    length]` and masks of the same length give `logits`: those of a first call, in which the past is empty.

    Not handled: a past of fixed length, a past that is read for more than being joined to new rows.
    """

    name: ClassVar[str] = "eject"

    def apply(self, subject: Subject) -> Outcome:
        """Take the cache out of `subject.model`.

        Raises:
            Refused: It cannot be taken out; the model is left as it was.
        """
        with room_for_deep_graphs():
            ejection = cache.eject(subject.model)
        if ejection is None:
            return Unchanged(reason="it has no cache: no input is joined with new rows into an output")
        subject.model = ejection.model
        write_note(subject.model, None)
        return Changed(edits=ejection.edits)


def without_cache(subject: Subject) -> Subject:
    """Return the subject without a cache: itself where it has none; the model that it was given stays as it is.

    Raises:
        Refused: Its cache cannot be taken out.
    """
    taken = Subject(model=subject.model, folder=subject.folder, config=subject.config)
    return taken if isinstance(Eject().apply(taken), Changed) else subject


def take_out(subject: Subject, idioms: Collection[str] = ("grow",)) -> CacheSignature | None:
    """Take the cache out of `subject.model` and return what it looked like; None where it has none.

    Args:
        subject: The model.
        idioms: In which a cache may be kept so that it can be put back.

    Raises:
        Refused: It cannot be taken out, or what is remembered is no attention's; the model is left as it was.
    """
    with room_for_deep_graphs():
        ejection = cache.eject(subject.model)
        if ejection is None:
            return None
        signature = ejection.signature.located(analyse(in_standard_operators(ejection.model).model))
    for entry in signature.entries:
        if len(entry.shape) != 4 or entry.axis != CANONICAL_AXIS or entry.idiom not in idioms:
            raise Refused(
                "the cache lies or is kept in a way of its own, and could not be put back so", at=entry.past,
                expected=f"[batch, kv_heads, sequence, head_dim], {' or '.join(idioms)}",
                found=f"{list(entry.shape)}, {entry.idiom}",
                hint="retarget gives it the usual form",
            )  # fmt: skip
    subject.model = ejection.model
    write_note(subject.model, None)
    subject.changed()
    return signature


def put_back(subject: Subject, signature: CacheSignature, fuse: Choice | None = None) -> Changed:
    """Inject a cache whose entries have the names and the order that `signature` says, kept as it was kept.

    What was taken out need not be what comes back: between the two the heads may have changed. Keys have the names
    that keys had and values those of values, layer by layer.

    Args:
        subject: The model without the cache.
        signature: What the cache looked like.
        fuse: Which attentions one operator is to compute, cache included.

    Raises:
        Refused: The model cannot be given a cache soundly, or needs entries that have no name.
    """
    outcome = inject(_unnamed(signature), subject, fuse)
    graph = subject.model.graph
    editor = Editor(subject.model)
    for name in signature.counters:
        counter = next(value for value in graph.inputs if value.name == PAST_LENGTH)
        editor.free(name)
        counter.name = name
    for kind in ("key", "value"):
        named = [entry for entry in sorted(signature.entries, key=_layer) if entry.kind == kind]
        pasts, presents = (_of_kind(values, kind) for values in (graph.inputs, graph.outputs))
        if len(pasts) > len(named):
            raise Refused(f"the cache needs {len(pasts)} {kind} entries, and there are names for {len(named)}")
        for entry, past, present in zip(named, pasts, presents, strict=False):
            for value, name in ((past, entry.past), (present, entry.present)):
                editor.free(name)
                value.name = name
    _in_order(graph.inputs, signature.inputs)
    _in_order(graph.outputs, signature.outputs)
    return outcome


def _unnamed(signature: CacheSignature) -> Inject:
    """A cache kept as the signature says, whose entries have names that nobody else has."""
    past, present = ("kvsurgeon." + which + ".{layer}.{kind}" for which in ("past", "present"))
    if signature.entries[0].idiom == "grow":
        return Inject(past=past, present=present)
    count: Count = "input" if signature.counters else "mask"
    return Inject(past=past, present=present, idiom=signature.entries[0].idiom, past_length=count)


def _layer(entry: CacheEntry) -> int:
    assert entry.layer is not None, "the signature is not located"
    return entry.layer


def _of_kind(values: Sequence[ir.Value], kind: str) -> list[ir.Value]:
    """The new entries of a kind, in the order of their layers."""
    return [v for v in values if (v.name or "").startswith("kvsurgeon.") and (v.name or "").endswith(kind)]


def _in_order(values: MutableSequence[ir.Value], names: Sequence[str]) -> None:
    """Put the values of these names behind all others, in the order of the names."""
    places = {name: place for place, name in enumerate(names)}
    ordered = sorted(values, key=lambda value: places.get(value.name or "", -1))
    values.clear()
    values.extend(ordered)
