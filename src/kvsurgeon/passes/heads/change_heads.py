"""Common code of the passes that change KV heads: they edit a copy, which replaces the model at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.cache.signature import CacheSignature
from kvsurgeon.errors import UsageError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.replace_heads import HeadReplacer, NewHeads
from kvsurgeon.heads.selection import Selection
from kvsurgeon.io.model_config import ModelHeads
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import CACHE_TOKENS, Changed, Outcome, Subject, Unchanged
from kvsurgeon.resizing.windows import Window, union

SelectHeads = Callable[[int, HeadCounts], Selection | None]  # for a layer; None leaves it unchanged
Plan = Callable[[HeadReplacer], Sequence[NewHeads | None]]
Calibrate = Callable[[Subject], tuple[str, ...]]  # changes weights of a model without a cache, and returns notes


def change_heads(subject: Subject, select: SelectHeads, *, lossy: bool, calibrate: Calibrate | None = None) -> Outcome:
    """Give each layer the heads that `select` returns for it, after `calibrate` changed the weights.

    Raises:
        UsageError: A layer cannot have that number of heads.
        UnsupportedError: The weights of a layer's heads cannot be found.
    """
    selections: dict[tuple[int, int], Selection] = {}  # one object for equal selections: layers may share weights

    def plan(replacer: HeadReplacer) -> list[NewHeads | None]:
        wanted: list[NewHeads | None] = []
        for layer, counts in enumerate(replacer.counts):
            selection = select(layer, counts)
            if selection is not None:
                selection = selections.setdefault((selection.count, selection.size), selection)
            wanted.append(None if selection is None else ((layer,), selection))
        return wanted

    return replace_heads(subject, plan, lossy=lossy, calibrate=calibrate)


def replace_heads(subject: Subject, plan: Plan, *, lossy: bool, calibrate: Calibrate | None = None) -> Outcome:
    """Replace the heads of the layers as planned; a cache is removed before and injected again after.

    Raises:
        UnsupportedError: The weights of a layer's heads cannot be found, or the cache cannot be injected again.
    """
    work = subject.with_model(subject.model)
    signature = detach_cache(work)
    notes = _notes(subject)
    if calibrate is not None:
        work.analysis_of_copy()
        notes += calibrate(work)
        work.changed()
    without_cache = copy_model(work.model) if lossy else work.model
    with deep_recursion():
        replacer = HeadReplacer(_analysis_of_copy(work, subject), lossy=lossy)
        if not replacer.counts:
            return Unchanged(reason="the model has no attention")
        size = bytes_of_cache(replacer.analysis, signature)
        before = _heads(replacer, [counts.kv_heads for counts in replacer.counts], range(len(replacer.counts)))
        wanted = plan(replacer)
        if not any(wanted):
            return Unchanged(reason="every layer already has this number of KV heads")
        edits = replacer.replace(wanted)
    work.model = replacer.analysis.model
    work.changed()
    kv_heads = [count if new is None else new[1].size for count, new in zip(before.kv, wanted, strict=True)]
    after = _heads(replacer, kv_heads, [layer if new is None else new[0][0] for layer, new in enumerate(wanted)])
    equal, cache_bytes = None, None
    if lossy:
        cache_bytes = size, bytes_of_cache(work.analysis(), signature)
        notes += _size_notes(*cache_bytes)
        equal = partial(_equal_models, without_cache, copy_model(work.model), wanted)
    if signature is not None:
        reattach_cache(work, signature)
    subject.model = work.model
    return Changed(
        edits=edits, notes=notes, exact=not lossy, heads=(before, after), equal_models=equal, cache_bytes=cache_bytes
    )


def _equal_models(
    before: ir.Model, after: ir.Model, wanted: Sequence[NewHeads | None]
) -> Sequence[tuple[ir.Model, ir.Model]]:
    """Return the model before with the weights of the new heads in an unchanged graph, and the model after."""
    work = Subject(model=copy_model(before))
    with deep_recursion():
        replacer = HeadReplacer(work.analysis(), lossy=True)
        replacer.replace_in_place(wanted)
    return [(replacer.analysis.model, after)]


def bytes_of_cache(analysis: Analysis, signature: CacheSignature | None) -> int:
    """Return the bytes of the cache of `CACHE_TOKENS` tokens, of which a signature may keep those of windows alone."""
    windows = {} if signature is None else signature.windows
    readers: dict[ir.Value, list[Window | None]] = {}
    points = {point.value: point for site in analysis.sites for _, point in site.cached_tensors}
    for index, site in enumerate(analysis.sites):
        for _, point in site.cached_tensors:
            readers.setdefault(point.value, []).append(windows.get(index))
    found = {value: union(windows) for value, windows in readers.items()}
    rows = {value: CACHE_TOKENS if window is None else window.most for value, window in found.items()}
    return sum(point.bits_per_token * min(rows[value], CACHE_TOKENS) for value, point in points.items()) // 8


def _size_notes(before: int, after: int) -> tuple[str, ...]:
    if after < before:
        return ()
    return (f"the cache is not smaller: {after / CACHE_TOKENS:g} bytes per token, before {before / CACHE_TOKENS:g}",)


def _analysis_of_copy(work: Subject, original: Subject) -> Analysis:
    """The analysis of the model in standard operators, of a copy if that is the original itself."""
    if work.decomposed().model is original.model:
        work.model = copy_model(original.model)
    return work.analysis()


def check_one_of(name: str, options: Mapping[str, bool]) -> None:
    """Check that exactly one of the options of a pass is given.

    Raises:
        UsageError: None or several are given.
    """
    given = [option for option, is_given in options.items() if is_given]
    if len(given) != 1:
        raise UsageError(f"{name}: expected one of {' and '.join(options)}, found {' and '.join(given) or 'none'}")


def invalid_count(layer: int, counts: HeadCounts, kv_heads: int, valid: Sequence[int]) -> UsageError:
    """Return the error for a number of KV heads that a layer cannot have."""
    return UsageError(
        f"layer {layer} has {counts.heads} query heads and {counts.kv_heads} KV heads: expected one of "
        f"{', '.join(map(str, valid))} KV heads, found {kv_heads}"
    )


def _notes(subject: Subject) -> tuple[str, ...]:
    if subject.folder is None or subject.config is not None or not (subject.folder / "config.json").is_file():
        return ()
    return ("config.json is not readable: its number of heads was not updated",)


def _heads(replacer: HeadReplacer, kv_heads: Sequence[int], owners: Sequence[int]) -> ModelHeads:
    """The numbers of heads if each layer reads the keys of its owner."""
    keys = {replacer.analysis.sites[owner].keys[0].cache_point.value for owner in owners}
    return ModelHeads(query=replacer.counts[0].heads, kv=tuple(kv_heads), kv_layers=len(keys))
