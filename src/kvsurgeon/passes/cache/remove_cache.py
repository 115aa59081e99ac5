"""Remove the cache of a model, and restore it with the same names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import onnx_ir as ir

from kvsurgeon.cache.layout import DEFAULT_LAYOUT, Layout, declared_shape
from kvsurgeon.cache.length_inputs import LengthInput
from kvsurgeon.cache.pairs import CacheMode
from kvsurgeon.cache.signature import CacheSignature, Kind, SignatureEntry
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.inject import SelectMatches, inject
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.resizing.lengths import INT64
from kvsurgeon.resizing.windows import Windows
from kvsurgeon.rewrite import cache_removal
from kvsurgeon.rewrite.cache_metadata import read_cache_metadata, write_cache_metadata
from kvsurgeon.rewrite.cache_options import CacheOptions
from kvsurgeon.rewrite.cache_plan import PAST_LENGTH, first_position
from kvsurgeon.symbolic.dimension import NEW

_RETARGET_HINT = "retarget changes the cache"
_FIXED_ROWS_HINT = "the fixed rows of the cache are taken for the length of the text: leave max-length out"
_WINDOWS_HINT = "export the model with an attention mask: its length is known if no layer keeps all rows"


@dataclass(frozen=True, kw_only=True)
class RemoveCache:
    """Remove the cache inputs and outputs: the model then computes whole sequences.

    Before: `input_ids`, masks of past and new tokens, and cache inputs give `logits` and cache outputs. After:
    `input_ids [batch, length]` and masks of that length give the `logits` of a first call, in which the past is empty.

    If a buffer has a fixed number of rows, a call then has as many tokens.

    Not handled: other cache inputs of fixed length, cache inputs that are read for more than their update.
    """

    name: ClassVar[str] = "remove-cache"

    def apply(self, subject: Subject) -> Outcome:
        """Remove the cache of `subject.model`.

        Raises:
            UnsupportedError: It cannot be removed; the model is unchanged.
        """
        with deep_recursion():
            removed = cache_removal.remove_cache(subject.model)
        if removed is None:
            return Unchanged(reason="the model has no cache: no output is an input with new rows")
        subject.model = removed.model
        write_cache_metadata(subject.model, None)
        return Changed(edits=removed.edits)


def without_cache(subject: Subject) -> Subject:
    """Return a subject without a cache: the subject itself if it has none. The subject is unchanged.

    Raises:
        UnsupportedError: The cache cannot be removed.
    """
    copy = subject.with_model(subject.model)
    return copy if isinstance(RemoveCache().apply(copy), Changed) else subject


def detach_cache(subject: Subject) -> CacheSignature | None:
    """Remove the cache of `subject.model`, and return what `reattach_cache` restores; None if it has none.

    Raises:
        UnsupportedError: It cannot be removed, no attention reads it, or it could not be restored; the model is
            unchanged.
    """
    with deep_recursion():
        removed = cache_removal.remove_cache(subject.model, dynamic=True)
        if removed is None:
            return None
        metadata = read_cache_metadata(subject.model)
        layouts: dict[Kind, Layout] = {}
        if metadata is not None:
            layouts = {"key": metadata.key_layout, "value": metadata.value_layout}
        detached = Subject(model=removed.model)
        signature = removed.signature.located(detached.analysis(), layouts)
    _options(signature)
    replaced = next((value for value in subject.model.graph.inputs if value.name not in signature.inputs), None)
    if replaced is not None:
        raise UnsupportedError(
            "an input chooses between branches, or holds several cached tensors, which cannot be restored",
            code=Code.UNKNOWN_CACHE, at=replaced.name, expected="an input for each cached tensor", hint=_RETARGET_HINT,
        )  # fmt: skip
    write_cache_metadata(detached.model, None)
    subject.become(detached)
    return signature


def reattach_cache(
    subject: Subject,
    signature: CacheSignature,
    select: SelectMatches | None = None,
    padding: Literal["mask", "lengths"] = "mask",
    bits: int | None = None,
    windows: Windows | None = None,
) -> Changed:
    """Inject a cache with the cache mode, layouts, types, names and order of a signature.

    The heads may have changed since the cache was detached. Keys get the names of keys, and values those of values,
    layer by layer.

    Args:
        subject: The model without the cache.
        signature: The cache.
        select: Returns the attention sites to replace by operators that update the cache; the graph must then be
            unchanged since `detach_cache`.
        padding: Whether the operators read a mask, or the numbers of tokens that it gives.
        bits: Bits of an integer, if keys and values are to be quantized; their scales get the names of the entries,
            followed by `_scale`.
        windows: The rows that are cached, by the index of the attention site; all of other sites. None for those of the
            signature.

    Raises:
        UnsupportedError: The model does not support such a cache, or needs more cached tensors.
    """
    options = _options(signature)
    layouts = options.key_layout, options.value_layout
    if select is not None and layouts != (DEFAULT_LAYOUT, DEFAULT_LAYOUT):
        raise _not_restorable(signature.entries[0], [*DEFAULT_LAYOUT], [*options.key_layout])
    windows = signature.windows if windows is None else windows
    if select is not None and windows:
        raise _not_restorable(signature.entries[0], "a cache of all rows", "the rows of a window")
    if select is None:
        subject.changed()  # the caller may have edited the graph
    if bits is not None:
        signature = signature.quantized(bits)
    try:
        outcome = inject(options, subject, select, padding, bits, windows)
    except UnsupportedError as error:
        if signature.capacity is not None and error.code is Code.FIXED_LENGTH:
            error.hint = _FIXED_ROWS_HINT
        if windows and error.code is Code.UNTRACEABLE_SEQUENCE:
            error.hint = _WINDOWS_HINT
        raise
    graph, editor = subject.model.graph, Editor(subject.model)
    for kind in get_args(Kind):
        entries = [entry for entry in signature.entries if entry.kind == kind]
        _restore_names(editor, sorted(entries, key=lambda entry: entry.layer or 0), kind)
    if signature.length_input is not None:
        _restore_length_input(editor, signature.length_input)
    _sort(graph.inputs, signature.inputs)
    _sort(graph.outputs, signature.outputs)
    return outcome


def _options(signature: CacheSignature) -> CacheOptions:
    """Return the options of `inject` that give such a cache, with temporary names.

    Raises:
        UnsupportedError: There are none.
    """
    first = signature.entries[0]
    mode = next((one.cache_mode for one in signature.entries if one.cache_mode in get_args(CacheMode)), "dynamic")
    repeated = Counter((entry.layer, entry.kind) for entry in signature.entries)
    layouts: dict[str, Layout] = {}  # a state has the layout of values
    for entry in (one for one in signature.entries if one.cache_mode != "recurrent"):
        if entry.kind in ("key_scale", "value_scale"):
            raise _not_restorable(entry, "rows of floats", "integers and scales", "run quantize-cache after this pass")
        if entry.layout is None or entry.kind is None or repeated[entry.layer, entry.kind] > 1:
            raise _not_restorable(entry, list(DEFAULT_LAYOUT), list(entry.shape))
        layout = layouts.setdefault("key" if entry.kind == "key" else "value", entry.layout)
        if entry.layout != layout or entry.cache_mode not in (mode, "last-rows"):
            raise _not_restorable(entry, [mode, *layout], [entry.cache_mode, *entry.layout])
        if entry.window is not None and entry.cache_mode != "last-rows":
            found = f"the last {entry.window}, as {entry.operator} keeps them"
            raise _not_restorable(entry, "a cache of all rows", found, "run window-cache after this pass")
    if signature.past_length is None:
        raise _not_restorable(first, "at most one input that gives the number of past tokens", "several")
    source = signature.length_input
    if source is not None and source.is_per_sequence:
        raise UnsupportedError(
            "the number of past tokens is given for each sequence of the batch, which cannot be restored",
            code=Code.UNKNOWN_CACHE, at=source.source.name, expected="one number",
            found=str(list(declared_shape(source.source))),
            hint=_RETARGET_HINT,
        )  # fmt: skip
    return CacheOptions(
        past="kvsurgeon.past.{layer}.{kind}", present="kvsurgeon.present.{layer}.{kind}", cache=cast("CacheMode", mode),
        past_length=signature.past_length, max_length=signature.capacity,
        key_layout=layouts.get("key", DEFAULT_LAYOUT), value_layout=layouts.get("value", DEFAULT_LAYOUT),
    )  # fmt: skip


def _not_restorable(
    entry: SignatureEntry, expected: object, found: object, hint: str = _RETARGET_HINT
) -> UnsupportedError:
    return UnsupportedError(
        "the cache has a layout or cache mode that cannot be restored", code=Code.UNKNOWN_CACHE, at=entry.past,
        expected=str(expected), found=str(found), hint=hint,
    )  # fmt: skip


def _restore_names(editor: Editor, entries: Sequence[SignatureEntry], kind: str) -> None:
    """Give the new cache inputs and outputs of a kind the names of the entries, in the order of their layers."""
    temporary, interface = re.compile(rf"kvsurgeon\..*\.{kind}"), (editor.graph.inputs, editor.graph.outputs)
    pasts, presents = ([value for value in values if temporary.fullmatch(value.name or "")] for values in interface)
    if len(pasts) > len(entries):
        raise UnsupportedError(
            f"the model needs more cached {kind} tensors than the cache had", code=Code.UNKNOWN_CACHE,
            expected=str(len(pasts)), found=str(len(entries)),
        )  # fmt: skip
    for entry, past, present in zip(entries, pasts, presents, strict=False):
        if past.dtype is not entry.dtype:
            raise UnsupportedError(
                "the element type of the cache cannot be restored", code=Code.UNKNOWN_CACHE, at=entry.past,
                expected=str(entry.dtype), found=str(past.dtype), hint=_RETARGET_HINT,
            )  # fmt: skip
        for value, name in ((past, entry.past), (present, entry.present)):
            editor.release_name(name)
            value.name = name


def _restore_length_input(editor: Editor, length: LengthInput) -> None:
    """Give the input of the number of past tokens the name, type and shape of another, which may hold positions."""
    inputs, source, name = editor.graph.inputs, length.source, length.source.name or ""
    index = next(index for index, value in enumerate(inputs) if value.name == PAST_LENGTH)
    editor.release_name(name)
    shape = declared_shape(source)
    if length.counts_up:
        shape = (*shape[:-1], str(NEW))
    restored = number = ir.Value(name=name, type=source.type, shape=ir.Shape(shape))
    if shape != (1,):
        number = first_position(editor, restored, name=f"{name}.flat")
    if source.dtype is not INT64:
        number = editor.node("Cast", [number], {"to": int(INT64)}, name=f"{name}.int64", dtype=INT64)
    inputs[index].replace_all_uses_with(number)
    inputs[index] = restored
    editor.finish()


def _sort(values: MutableSequence[ir.Value], names: Sequence[str]) -> None:
    """Move the values of these names behind all others, in the order of the names."""
    places = {name: place for place, name in enumerate(names)}
    ordered = sorted(values, key=lambda value: places.get(value.name or "", -1))
    values.clear()
    values.extend(ordered)
