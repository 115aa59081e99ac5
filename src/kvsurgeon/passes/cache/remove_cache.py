"""Take the cache out of a model, and put one back under the names that it had."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.cache.layout import USUAL, Layout
from kvsurgeon.cache.length_inputs import Tally
from kvsurgeon.cache.signature import CacheEntry, CacheSignature, Part
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.inject import Choice, Inject, inject
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_metadata import read_cache_metadata, write_cache_metadata
from kvsurgeon.rewrite.cache_plan import PAST_LENGTH
from kvsurgeon.rewrite.cache_removal import eject


@dataclass(frozen=True, kw_only=True)
class RemoveCache:
    """Take past inputs and present outputs out, so that the model computes whole texts, as before it had a cache.

    Before: `input_ids`, masks for all tokens so far and pasts give `logits` and presents. After: `input_ids [batch,
    length]` and masks of the same length give `logits`: those of a first call, in which the past is empty.

    Where a buffer's rows are a number, so are the tokens of a call afterwards: as many as the buffer has rows.

    Not handled: another past of fixed length, a past that is read for more than being joined to new rows.
    """

    name: ClassVar[str] = "remove-cache"

    def apply(self, subject: Subject) -> Outcome:
        """Take the cache out of `subject.model`.

        Raises:
            UnsupportedError: It cannot be taken out; the model is left as it was.
        """
        with deep_recursion():
            ejection = eject(subject.model)
        if ejection is None:
            return Unchanged(reason="it has no cache: no input is joined with new rows into an output")
        subject.model = ejection.model
        write_cache_metadata(subject.model, None)
        return Changed(edits=ejection.edits)


def without_cache(subject: Subject) -> Subject:
    """Return the subject without a cache: itself where it has none; the model that it was given stays as it is.

    Raises:
        UnsupportedError: Its cache cannot be taken out.
    """
    taken = Subject(model=subject.model, folder=subject.folder, config=subject.config)
    return taken if isinstance(RemoveCache().apply(taken), Changed) else subject


def take_out(subject: Subject) -> CacheSignature | None:
    """Take the cache out of `subject.model` and return what it looked like; None where it has none.

    Raises:
        UnsupportedError: It cannot be taken out, what is remembered is no attention's, or it could not be put back in
            the form
            that it has; the model is left as it was.
    """
    with deep_recursion():
        ejection = eject(subject.model)
        if ejection is None:
            return None
        note = read_cache_metadata(subject.model)
        noted: dict[Part, Layout] = {}
        if note is not None:
            noted = {"key": note.key_layout, "value": note.value_layout}
        without = Subject(model=ejection.model)
        signature = ejection.signature.located(without.analysis(), noted)
    _as_injection(signature)
    write_cache_metadata(without.model, None)
    subject.become(without)
    return signature


def put_back(subject: Subject, signature: CacheSignature, fuse: Choice | None = None) -> Changed:
    """Inject a cache in the form that `signature` tells: cache mode, layouts, types, names and order.

    What was taken out need not be what comes back: between the two the heads may have changed. Keys have the names
    that keys had and values those of values, layer by layer.

    Args:
        subject: The model without the cache.
        signature: What the cache looked like.
        fuse: Which attentions one operator is to compute, cache included; the graph is then as `take_out` left it.

    Raises:
        UnsupportedError: The model cannot be given such a cache soundly, or needs entries that have no name.
    """
    wanted = _as_injection(signature)
    if fuse is not None and (wanted.key_layout, wanted.value_layout) != (USUAL, USUAL):
        raise _of_its_own(signature.entries[0], [*USUAL], [*wanted.key_layout])
    if fuse is None:
        subject.changed()  # the caller may have edited the graph
    outcome = inject(wanted, subject, fuse)
    graph = subject.model.graph
    editor = Editor(subject.model)
    for kind in ("key", "value", "state"):
        named = [entry for entry in sorted(signature.entries, key=_layer) if entry.kind == kind]
        pasts, presents = (_of_kind(values, kind) for values in (graph.inputs, graph.outputs))
        if len(pasts) > len(named):
            raise UnsupportedError(f"the cache needs {len(pasts)} {kind} entries, and there are names for {len(named)}")
        for entry, past, present in zip(named, pasts, presents, strict=False):
            if past.dtype is not entry.dtype:
                raise UnsupportedError(
                    "the cache cannot be kept in the type that it was kept in", at=entry.past,
                    expected=str(entry.dtype), found=str(past.dtype), hint="retarget gives it another form",
                )  # fmt: skip
            for value, name in ((past, entry.past), (present, entry.present)):
                editor.release_name(name)
                value.name = name
    if signature.tally is not None and signature.tally.count == "input":
        _tell_as_before(editor, signature.tally)
    _in_order(graph.inputs, signature.inputs)
    _in_order(graph.outputs, signature.outputs)
    return outcome


def _as_injection(signature: CacheSignature) -> Inject:
    """The pass that makes a cache of this form, but for its names.

    Raises:
        UnsupportedError: There is none.
    """
    first = signature.entries[0]
    layouts: dict[str, Layout] = {}  # a state lies as values do
    for entry in signature.entries:
        if entry.layout is None or entry.kind is None:
            raise _of_its_own(entry, list(USUAL), list(entry.shape))
        layout = layouts.setdefault("key" if entry.kind == "key" else "value", entry.layout)
        if (entry.cache_mode, entry.layout) != (first.cache_mode, layout):
            raise _of_its_own(entry, [first.cache_mode, *layout], [entry.cache_mode, *entry.layout])
    tally = signature.tally
    if tally is None:
        raise _of_its_own(first, "one input that tells the number of past tokens, or none", "several")
    if any(size != 1 for size in tally.shape):
        raise UnsupportedError(
            "the number of past tokens is told for each row of a batch, and could not be told so again", at=tally.name,
            expected="one number", found=str(list(tally.shape)), hint="retarget gives the cache another form",
        )  # fmt: skip
    return Inject(
        past="kvsurgeon.past.{layer}.{kind}", present="kvsurgeon.present.{layer}.{kind}",
        cache=first.cache_mode, past_length=tally.count, max_length=signature.room,
        key_layout=layouts.get("key", USUAL), value_layout=layouts.get("value", USUAL),
    )  # fmt: skip


def _of_its_own(entry: CacheEntry, expected: object, found: object) -> UnsupportedError:
    return UnsupportedError(
        "the cache lies or is kept in a way of its own, and could not be put back so", at=entry.past,
        expected=str(expected), found=str(found), hint="retarget gives it the usual form",
    )  # fmt: skip


def _layer(entry: CacheEntry) -> int:
    assert entry.layer is not None, "the signature is not located"
    return entry.layer


def _of_kind(values: Sequence[ir.Value], kind: str) -> list[ir.Value]:
    """The new entries of a kind, in the order of their layers."""
    return [v for v in values if (v.name or "").startswith("kvsurgeon.") and (v.name or "").endswith(kind)]


def _tell_as_before(editor: Editor, tally: Tally) -> None:
    """Let the number of past tokens have the name, the type and the shape that it had."""
    inputs = editor.graph.inputs
    place = next(place for place, value in enumerate(inputs) if value.name == PAST_LENGTH)
    editor.release_name(tally.name)
    given = ir.Value(name=tally.name, type=ir.TensorType(tally.dtype), shape=ir.Shape(tally.shape))
    number = given
    if tally.dtype is not ir.DataType.INT64:
        wide = {"to": int(ir.DataType.INT64)}
        number = editor.node("Cast", [number], wide, name=f"{tally.name}.int64", dtype=ir.DataType.INT64)
    if tally.shape != (1,):
        flat = [number, editor.constant([1], name="shape")]
        number = editor.node("Reshape", flat, name=f"{tally.name}.flat", dtype=ir.DataType.INT64, shape=[1])
    inputs[place].replace_all_uses_with(number)
    inputs[place] = given
    editor.finish()


def _in_order(values: MutableSequence[ir.Value], names: Sequence[str]) -> None:
    """Put the values of these names behind all others, in the order of the names."""
    places = {name: place for place, name in enumerate(names)}
    ordered = sorted(values, key=lambda value: places.get(value.name or "", -1))
    values.clear()
    values.extend(ordered)
