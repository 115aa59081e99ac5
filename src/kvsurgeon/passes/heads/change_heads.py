"""What passes that change heads have in common: a copy is worked on, and takes the model's place in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from kvsurgeon.analysis.analysis import analyze
from kvsurgeon.decompose import decompose
from kvsurgeon.errors import UsageError
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.replace_heads import Exchange, Exchanger
from kvsurgeon.heads.selection import Selection
from kvsurgeon.io.model_config import ModelHeads
from kvsurgeon.passes.cache.remove_cache import put_back, take_out
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged

Wanted = Callable[[int, HeadCounts], Selection | None]  # of a layer's heads; None where they stay
Plan = Callable[[Exchanger], Sequence[Exchange | None]]


def change_heads(subject: Subject, wanted: Wanted, *, lossy: bool) -> Outcome:
    """Give each layer the heads that are wanted for it.

    Raises:
        UsageError: A layer cannot have so many.
        UnsupportedError: It cannot be proved which weights make the heads of a layer.
    """
    made: dict[tuple[int, int], Selection] = {}  # one object for layers that want the same, as they may share heads

    def plan(exchanger: Exchanger) -> list[Exchange | None]:
        found: list[Exchange | None] = []
        for layer, one in enumerate(exchanger.counts):
            selection = wanted(layer, one)
            if selection is not None:
                selection = made.setdefault((selection.count, selection.size), selection)
            found.append(None if selection is None else Exchange(layers=(layer,), selection=selection))
        return found

    return exchange(subject, plan, lossy=lossy)


def exchange(subject: Subject, plan: Plan, *, lossy: bool) -> Outcome:
    """Carry out what `plan` makes of the layers; a cache that the model has is taken out for it, and put back.

    Raises:
        UnsupportedError: It cannot be proved which weights make the heads of a layer, or the cache cannot be put back.
    """
    work = Subject(model=subject.model, folder=subject.folder, config=subject.config)
    signature = take_out(work)
    work.model = _copied(work.model)
    with deep_recursion():
        exchanger = Exchanger(analyze(work.model), lossy=lossy)
        before = _heads(exchanger, [one.kv_heads for one in exchanger.counts], range(len(exchanger.counts)))
        wanted = plan(exchanger)
        if not any(wanted):
            return Unchanged(reason="every layer has as many key and value heads as are wanted")
        edits = exchanger.exchange(wanted)
    made = [one.selection.size if one else kv for one, kv in zip(wanted, before.kv, strict=True)]
    after = _heads(exchanger, made, [one.layers[0] if one else layer for layer, one in enumerate(wanted)])
    if signature is not None:
        put_back(work, signature)
    subject.model = work.model
    return Changed(edits=edits, notes=_notes(subject), exact=not lossy, heads=(before, after))


def check_one_of(name: str, options: Mapping[str, bool]) -> None:
    """Leave quietly if just one of the options of a pass was given.

    Raises:
        UsageError: None was, or several.
    """
    given = [option for option, is_given in options.items() if is_given]
    if len(given) != 1:
        raise UsageError(f"{name}: expected one of {' and '.join(options)}, found {' and '.join(given) or 'none'}")


def not_a_count(layer: int, counts: HeadCounts, wanted: int, legal: Sequence[int]) -> UsageError:
    """An error: a layer cannot have so many heads."""
    return UsageError(
        f"layer {layer} has {counts.heads} query heads and {counts.kv_heads} KV heads: expected one of "
        f"{', '.join(map(str, legal))} KV heads, found {wanted}"
    )


def _notes(subject: Subject) -> tuple[str, ...]:
    """What does not follow: a config that is there and cannot be read."""
    if subject.folder is None or subject.config is not None or not (subject.folder / "config.json").is_file():
        return ()
    return ("config.json cannot be read, so the number of heads in it stays what it is",)


def _heads(exchanger: Exchanger, kv_heads: Sequence[int], owners: Sequence[int]) -> ModelHeads:
    """How many heads there are where each layer reads the keys of its owner."""
    keys = {exchanger.analysis.heads[owner].keys[0].memory.value for owner in owners}
    return ModelHeads(query=exchanger.counts[0].heads, kv=tuple(kv_heads), kv_layers=len(keys))


def _copied(model: ir.Model) -> ir.Model:
    """The model in standard operators, in any case another one."""
    plain = decompose(model).model
    if plain is model:
        plain = model.clone()
        plain.meta.update(model.meta)
    return plain
