"""Facts as tables for a terminal, readable in a pipe too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvsurgeon.passes.contract import Unchanged

if TYPE_CHECKING:
    from kvsurgeon.anatomy import Attention, CachedTensor, Decoder, Mask
    from kvsurgeon.parity import Loss, Report
    from kvsurgeon.targets import Obstacle
    from kvsurgeon.workflow.pipeline import PassResult
    from kvsurgeon.workflow.surgery import Surgery
    from kvsurgeon.workflow.verification import Sameness

_NUMBERS = ("layer", "query heads", "kv heads", "head dim", "scale", "rotary", "B/token", "batch", "tokens", "error")
_CACHE_MODES = {
    "dynamic": "growing",
    "static": "a buffer written in place",
    "new-tokens": "of which only new rows come back",
}
PIPE_WIDTH = 200  # columns where no terminal says how many there are: nothing is cut off


def console(*, stderr: bool = False) -> Console:
    """Return a console that wraps for a terminal and leaves lines whole in a pipe."""
    found = Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, width=PIPE_WIDTH)


def anatomy(decoder: Decoder) -> RenderableType:
    """Return a decoder as a table by layers, with totals, and what was proved and assumed of it."""
    table = _table("layer", "query heads", "kv heads", "head dim", "scale", "mask", "rotary", "cached key", "B/token")
    for attention in decoder.attentions:
        _add(table, *_layer(attention))
    return Group(
        table,
        Text(_totals(decoder)),
        *_cache(decoder.cache),
        *_statements("proved", decoder.proved, "✓"),
        *_assumed(decoder),
    )


def verification(report: Report) -> RenderableType:
    """Return what the judge tried, a row for each scenario, and what it says."""
    table = _table("scenario", "batch", "tokens", "chunks", "error", "same token", "verdict")
    for trial in report.trials:
        _add(
            table,
            trial.scenario,
            str(trial.batch),
            str(trial.length),
            _chunks(trial.chunks),
            "-" if trial.error is None else f"{trial.error:.1e}",
            "-" if trial.agreement is None else f"{trial.agreement:.1%}",
            trial.verdict,
        )
    lines = [Text(f"{report.verdict}: {_said(report)}")]
    lines += [Text(f"  ✗ {problem}") for problem in report.problems]
    lines += [Text(f"  note: {note}") for note in report.notes]
    return Group(*([table] if report.trials else []), *lines)


def sameness(judged: Sameness) -> RenderableType:
    """Return what the judge said of two models: all that it tried, where a cache came in."""
    if judged.report is not None:
        return verification(judged.report)
    said = {"same": "all outputs are the same", "different": "outputs differ", "unknown": "nothing could be compared"}
    lines = [Text(f"{judged.verdict}: {said[judged.verdict]}")]
    return Group(*lines, *(Text(f"  ✗ {problem}") for problem in judged.problems))


def loss(lost: Loss) -> RenderableType:
    """Return how much was lost, in a few lines, and as a table by layers where these were looked at."""
    lines = [
        Text(f"lost on {lost.text}, {lost.tokens} tokens:"),
        Text(f"  KL divergence  {lost.divergence:.4g} nats per token"),
        Text(f"  same token     {lost.agreement:.1%}"),
        Text(f"  perplexity     {lost.perplexity_before:.5g} before, {lost.perplexity_after:.5g} after"),
    ]
    if not lost.layers:
        return Group(*lines)
    table = _table("layer", "error")
    for layer in lost.layers:
        _add(table, str(layer.layer), f"{layer.error:.1%}")
    return Group(*lines, Text("output of each attention, what earlier layers lost included:"), table)


def surgery(done: Surgery) -> RenderableType:
    """Return in a few lines what was done to a model, what the judge said, and where the model is."""
    lines = [Text(_step_words(step)) for step in done.steps]
    lines += [Text(f"  note: {note}") for note in done.notes]
    if done.sameness is not None:
        lines.append(Text("verified: " + ("all outputs as before" if done.report is None else _said(done.report))))
        lines += [Text(f"  note: {note}") for note in (() if done.report is None else done.report.notes)]
    elif done.loss is None:
        lines.append(Text("not verified"))
    lost = () if done.loss is None else (loss(done.loss),)
    written = () if done.path is None else (Text(f"written to {done.path}"),)
    return Group(*lines, *lost, *written)


def passes(found: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Return the passes as a table; see `kvsurgeon.report.answer.passes`."""
    table = _table("pass", "what is true afterwards", "options", "from")
    for one in found:
        options = ", ".join(f"{option['name']}={option['type']}" for option in one.get("options", ()))
        said = f"✗ {one['error']}" if "error" in one else one["summary"]
        _add(table, one["name"], said, options or "-", one["package"])
    return table


def targets(found: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Return the targets as a table; see `kvsurgeon.report.answer.targets`."""
    table = _table("target", "who takes the folder", "tried with", "from")
    for one in found:
        said = f"✗ {one['error']}" if "error" in one else one["summary"]
        _add(table, one["name"], said, one.get("tried", "-"), one["package"])
    return table


def target(described: Mapping[str, Any]) -> RenderableType:
    """Return one target as a table, a row for each thing that it says; see `kvsurgeon.report.answer.target`."""
    table = _table(described["name"], described["summary"])
    for name, said in described.items():
        if name not in ("name", "summary", "passes") and said not in (None, [], {}, False):
            _add(table, _LABELS.get(name, name.replace("_", " ")), _said_words(said))
    for one in described["passes"]:
        options = (f"{name.replace('_', '-')}={_said_words(value)}" for name, value in one.items() if name != "pass")
        _add(table, f"pass {one['pass']}", "; ".join(options) or "-")
    return table


_LABELS = {
    "needs": "must have",
    "feeds": "may be given",
    "uniform": "one shape for all layers",
    "beside": "copied, and wanted",
    "side_files": "written beside",
}


def obstacles(name: str, found: Iterable[Obstacle]) -> RenderableType:
    """Return what stands between a model and the target of that name, a line each."""
    listed = tuple(found)
    stopping = sum(obstacle.stops for obstacle in listed)
    said = "nothing stands in the way" if not stopping else f"{stopping} in the way"
    lines = [Text(f"target {name}: {said}")]
    return Group(*lines, *(Text(f"  {'✗' if one.stops else 'note:'} {one}") for one in listed))


def mask_words(mask: Mask) -> str:
    """Return a mask in a few words: `sliding window 4096 + padding`.

    >>> from kvsurgeon.anatomy import Mask
    >>> mask_words(Mask(kind="causal", padding=True, bias=True))
    'causal + bias + padding'
    """
    kinds: Mapping[str, str] = {"sliding-window": f"sliding window {mask.window}", "chunked": f"chunked {mask.chunk}"}
    kind = kinds.get(mask.kind, mask.kind)
    return " + ".join([kind, *(["bias"] if mask.bias else []), *(["padding"] if mask.padding else [])])


def size_words(count: int) -> str:
    """Return bytes as people read them.

    >>> size_words(640), size_words(23_040)
    ('640 B', '22.5 KiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _said_words(said: Any) -> str:
    if isinstance(said, Mapping):
        return "; ".join(f"{name}: {_said_words(one)}" for name, one in said.items())
    return ", ".join(map(str, said)) if isinstance(said, list | tuple) else "yes" if said is True else str(said)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # as text: a name may look like markup


def _step_words(step: PassResult) -> str:
    if isinstance(step.outcome, Unchanged):
        return f"{step.name}: unchanged, {step.outcome.reason}"
    return f"{step.name}: {step.outcome.edits} edits in {step.seconds:.2f} s"


def _layer(attention: Attention) -> Iterable[str]:
    own = attention.shares_cache_with is None
    key, value = attention.key_cache, attention.value_cache
    return (
        str(attention.layer),
        str(attention.query_heads),
        str(attention.kv_heads),
        _dims(attention),
        "-" if attention.scale is None else f"{attention.scale:.4g}",
        mask_words(attention.mask) + ("" if attention.softcap is None else f" + softcap {attention.softcap:g}"),
        _rotary_words(attention),
        f"{key.value} {key.dtype}" if own else f"as layer {attention.shares_cache_with}",
        str(key.bytes_per_token + value.bytes_per_token) if own else "0",
    )


def _dims(attention: Attention) -> str:
    key, value = attention.head_dim, attention.value_head_dim
    return str(key) if key == value else f"{key}/{value}"


def _rotary_words(attention: Attention) -> str:
    rotated, head_dim = attention.rotary_dim, attention.head_dim
    return "-" if rotated is None else str(rotated) if rotated == head_dim else f"{rotated} of {head_dim}"


def _totals(decoder: Decoder) -> str:
    count, shared = len(decoder.attentions), len(decoder.attentions) - decoder.cache_entries
    sharing = f" ({shared} of them share another's)" if shared else ""
    longest = "" if decoder.max_length is None else f", at most {decoder.max_length} tokens"
    size = size_words(decoder.cache_bytes_per_token)
    return f"{count} layers{sharing}, opset {decoder.opset}{longest}; the cache grows by {size} per token"


def _cache(cache: Sequence[CachedTensor]) -> list[Text]:
    """A line for all tensors of a cache that are alike, whatever they are called."""
    alike: dict[str, list[CachedTensor]] = {}
    for one in cache:
        shape = ", ".join(map(str, one.shape))
        alike.setdefault(f"{one.dtype} [{shape}], {_CACHE_MODES[one.cache_mode]}", []).append(one)
    return [
        Text(f"it has a cache: {len(ones)} of {said}: `{ones[0].past}` comes back as `{ones[0].present}`")
        for said, ones in alike.items()
    ]


def _statements(title: str, statements: Iterable[str], sign: str) -> list[Text]:
    lines = [Text(f"  {sign} {statement}") for statement in statements]
    return [Text(title), *lines] if lines else []


def _assumed(decoder: Decoder) -> list[Text]:
    return _statements("assumed (the judge decides)", decoder.assumed, "?")


def _chunks(chunks: tuple[int, ...]) -> str:
    if len(chunks) > 4:
        return f"{chunks[0]}, {chunks[1]}, ... {chunks[-1]} ({len(chunks)})"
    return ", ".join(map(str, chunks))


def _said(report: Report) -> str:
    if report.error is None:
        return "nothing was compared"
    allowed = f"{report.tolerance.error:.0e} for {report.arithmetic}"
    return f"largest error {report.error:.1e} of the spread of the logits (allowed {allowed}), {report.seconds:.1f} s"
