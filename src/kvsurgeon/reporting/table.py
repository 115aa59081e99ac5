"""Tables and text for a terminal or a pipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from kvsurgeon.passes.contract import CACHE_TOKENS, Unchanged
from kvsurgeon.passes.options import text_of
from kvsurgeon.reporting.json_output import print_json
from kvsurgeon.reporting.layer_ranges import group_layers, ranges_text
from kvsurgeon.reporting.terminal import TextTable, console

if TYPE_CHECKING:
    from kvsurgeon.anatomy import Attention, CachedTensor, CrossAttention, Decoder, Mask
    from kvsurgeon.parity import AccuracyLoss, Report
    from kvsurgeon.targets import Incompatibility
    from kvsurgeon.workflow.confirmation import Confirmation
    from kvsurgeon.workflow.pipeline import PassResult, PipelineRun
    from kvsurgeon.workflow.sweep import SweepPoint

_LARGE = 64 * 2**20  # bytes of a copy that a user may want to avoid
_CACHE_MODES = {
    "dynamic": "dynamic",
    "static": "static buffer",
    "new-tokens": "only new rows returned",
    "last-rows": "the last rows",
    "recurrent": "a recurrent state",
}
_TARGET_LABELS = {
    "tried": "tested with",
    "needs": "required inputs and outputs",
    "feeds": "allowed inputs",
    "cache_sizes_that_are_numbers": "fixed cache sizes",
    "uniform": "same cache shape in all layers",
    "opset": "newest opset",
    "banned": "unsupported operators",
    "beside": "required files",
    "side_files": "written files",
}


def print_result(shown: RenderableType, document: Any, *, json: bool) -> None:
    """Print a result for people or, if `json`, for programs."""
    if json:
        print_json(document)
    else:
        console().print(shown)


def decoder_table(decoder: Decoder) -> RenderableType:
    """Return a row for each group of equal attention layers, with totals, and what was proved and assumed."""
    table = TextTable(
        "layer", "query heads", "kv heads", "head dim", "scale", "mask", "rotary", "cached key", "B/token"
    )
    for (*cells, size), layers in group_layers(map(_attention_cells, decoder.attentions)).items():
        attentions = [decoder.attentions[layer] for layer in layers]
        table.add(ranges_text(layers), *cells, _cached_key(attentions), size)
    lines = [*_cross_lines(decoder.cross_attentions), *_cache_lines(decoder.cache)]
    lines += _list("proved", decoder.proved, "✓")
    return Group(table, _totals(decoder), *lines, *_list("assumed (decided by verification)", decoder.assumed, "?"))


def report_table(report: Report) -> RenderableType:
    """Return a row for each scenario of a verification, and the verdict."""
    table = TextTable("scenario", "batch", "tokens", "chunks", "error", "same token", "verdict")
    for one in report.comparisons:
        error = "-" if one.error is None else f"{one.error:.1e}"
        agreement = "-" if one.agreement is None else f"{one.agreement:.1%}"
        table.add(one.scenario, one.batch, one.length, _chunks(one.chunks), error, agreement, one.verdict)
    lines = [f"{report.verdict}: {_largest_error(report)}"]
    lines += [f"  {line}" for line in _coverage_lines(report)]
    lines += [f"  ✗ {problem}" for problem in report.problems] + [f"  note: {note}" for note in report.notes]
    return Group(*([table] if report.comparisons else []), *map(Text, lines))


def loss_table(loss: AccuracyLoss) -> RenderableType:
    """Return the loss of accuracy, with a row for each attention layer if these were measured."""
    lines = [
        f"loss on {loss.text}, {loss.tokens} tokens:",
        f"  KL divergence  {loss.kl_divergence:.4g} nats per token",
        f"  same token     {loss.agreement:.1%}",
        f"  perplexity     {loss.reference_perplexity:.5g} before, {loss.candidate_perplexity:.5g} after",
    ]
    if not loss.layer_errors:
        return Group(*map(Text, lines))
    worst = max(range(len(loss.layer_errors)), key=loss.layer_errors.__getitem__)
    lines.append(f"  worst layer    {worst}, error {loss.layer_errors[worst]:.1%}")
    table = TextTable("layer", "error")
    for layer, error in enumerate(loss.layer_errors):
        table.add(layer, f"{error:.1%}")
    return Group(*map(Text, lines), Text("output of each attention layer, the loss of earlier layers included:"), table)


def sweep_table(points: Sequence[SweepPoint]) -> RenderableType:
    """Return a row for each pipeline of a sweep."""
    table = TextTable("passes", f"cache of {CACHE_TOKENS} tokens", "KL divergence", "perplexity")
    for point in points:
        perplexity = "-" if point.loss is None else f"{point.loss.candidate_perplexity:.5g}"
        table.add(point.passes or "original", size_text(point.cache_bytes), f"{point.kl_divergence:.4g}", perplexity)
    return table


def confirmation_table(found: Confirmation) -> RenderableType:
    """Return a line for each kind of statement of a certificate that holds."""
    lines = [
        f"confirmed: {found.model}",
        f"  the original is {found.original}",
        f"  SHA-256 of {len(found.files)} files",
        "  graph and weights: the result of the passes on the original",
        *(f"  {one.name}: {one.status}{f' - at `{one.at}`' if one.at else ''}" for one in found.obligations),
        f"  texts of the certificate, seed {found.repeated.seed}: {_largest_error(found.repeated)}",
        f"  new texts, seed {found.fresh.seed}: {_largest_error(found.fresh)}",
    ]
    return Group(*map(Text, lines))


def run_summary(run: PipelineRun) -> RenderableType:
    """Return a line for each pass, the verdict of the verification, and the path of the model."""
    lines = [_pass_line(step) for step in run.steps] + [f"  note: {note}" for note in run.notes]
    if run.verification is not None:
        lines.append(f"verified: {_largest_error(run.verification)}")
        lines += [f"  {line}" for line in _coverage_lines(run.verification)]
        lines += [f"  note: {note}" for note in run.verification.notes]
    elif run.loss is None:
        lines.append("not verified")
    if run.cache_bytes is not None:
        before, after = map(size_text, run.cache_bytes)
        lines.append(f"cache of {CACHE_TOKENS} tokens: {before} before, {after} after")
    loss = () if run.loss is None else (loss_table(run.loss),)
    return Group(*map(Text, lines), *loss, *map(Text, _written_lines(run)))


def _written_lines(run: PipelineRun) -> Iterator[str]:
    """Yield the path of the model, then a line for each other file that was written."""
    if run.path is None:
        return
    yield f"written to {run.path}"
    if run.certificate is not None:
        yield f"  certificate {run.certificate}"
    yield from (f"  {one.action} {one.path}" for one in run.files if one.path != run.path)
    if any(one.action == "copied" and one.path.stat().st_size > _LARGE for one in run.files):
        yield "  hint: an output in the folder of the model needs no copy of its weights, and --link-weights links them"


def passes_table(passes: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Return a row for each pass; see `kvsurgeon.reporting.json_output.passes_json`."""
    table = TextTable("pass", "effect", "package")
    for one in passes:
        table.add(one["name"], _summary(one), one["package"])
    return table


def pass_table(one: Mapping[str, Any]) -> RenderableType:
    """Return the effect of a pass and a row for each option; see `kvsurgeon.reporting.json_output.pass_json`."""
    table = TextTable("option", "value", "default", "help")
    for option in one["options"]:
        default = "required" if option["required"] else text_of(option["default"])
        table.add(option["name"], option["type"], default, option["help"])
    title = Text(f"{one['name']}, of {one['package']} ({one['target']})\n{one['summary']}")
    return Group(title, Text("no options") if not table.rows else table)


def targets_table(targets: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Return a row for each target; see `kvsurgeon.reporting.json_output.targets_json`."""
    table = TextTable("target", "client", "tested with", "package")
    for one in targets:
        table.add(one["name"], _summary(one), one.get("tried", "-"), one["package"])
    return table


def target_table(target: Mapping[str, Any]) -> RenderableType:
    """Return a row for each requirement of a target; see `kvsurgeon.reporting.json_output.target_json`."""
    table = TextTable(target["name"], target["summary"])
    for name, value in target.items():
        if name not in ("name", "summary", "passes") and value not in (None, [], {}, False):
            table.add(_TARGET_LABELS.get(name, name.replace("_", " ")), _value_text(value))
    for one in target["passes"]:
        options = (f"{name.replace('_', '-')}={_value_text(value)}" for name, value in one.items() if name != "pass")
        table.add(f"pass {one['pass']}", "; ".join(options) or "-")
    return table


def incompatibility_list(target: str, found: Sequence[Incompatibility]) -> RenderableType:
    """Return a line for each incompatibility of a model with the target of that name."""
    blocking = sum(one.blocking for one in found)
    count = "no incompatibilities" if not blocking else f"incompatible in {blocking} respect{'s' * (blocking > 1)}"
    lines = [f"target {target}: {count}", *(f"  {'✗' if one.blocking else 'note:'} {one}" for one in found)]
    return Group(*map(Text, lines))


def mask_text(mask: Mask) -> str:
    """Return a mask in a few words.

    >>> from kvsurgeon.anatomy import Mask
    >>> mask_text(Mask(kind="causal", padding=True, bias=True))
    'causal + bias + padding'
    """
    kinds: Mapping[str, str] = {"sliding-window": f"sliding window {mask.window}", "chunked": f"chunked {mask.chunk}"}
    kind = kinds.get(mask.kind, mask.kind)
    further = (("bias", mask.bias), ("padding", mask.padding), ("block in the first call", mask.block))
    return " + ".join([kind, *(name for name, holds in further if holds)])


def size_text(count: int) -> str:
    """Return a number of bytes in the unit that fits.

    >>> size_text(640), size_text(23_040)
    ('640 B', '22.5 KiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _summary(plugin: Mapping[str, Any]) -> str:
    return f"✗ {plugin['error']}" if "error" in plugin else str(plugin["summary"])


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_value_text(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "yes" if value is True else str(value)


def _pass_line(step: PassResult) -> str:
    if isinstance(step.outcome, Unchanged):
        return f"{step.name}: unchanged, {step.outcome.reason}"
    count = step.outcome.edits
    return f"{step.name}: {count} edit{'s' * (count != 1)} in {step.seconds:.2f} s"


def _attention_cells(attention: Attention) -> tuple[object, ...]:
    """Return what equal layers have in common, the size of the cache last."""
    key, value = attention.key_cache, attention.value_cache
    dims = tuple(dict.fromkeys((attention.head_dim, attention.value_head_dim)))
    rotated = attention.rotary_dim
    scale = "-" if attention.scale is None else f"{attention.scale:.4g}"
    mask = mask_text(attention.mask) + ("" if attention.softcap is None else f" + softcap {attention.softcap:g}")
    rotary = "-" if rotated is None else rotated if rotated == dims[0] else f"{rotated} of {dims[0]}"
    size = key.bytes_per_token + value.bytes_per_token if attention.shares_cache_with is None else 0
    return attention.query_heads, attention.kv_heads, "/".join(map(str, dims)), scale, mask, rotary, size


def _cached_key(layers: Sequence[Attention]) -> str:
    """Return the names and the element types of the cached keys of equal layers."""
    shared = [one.shares_cache_with for one in layers if one.shares_cache_with is not None]
    if shared:
        return f"as layer {ranges_text(sorted(set(shared)))}"
    keys = [one.key_cache for one in layers]
    names = keys[0].value if len(keys) == 1 else f"{keys[0].value} ... {keys[-1].value}"
    return f"{names} {', '.join(dict.fromkeys(one.dtype for one in keys))}"


def _totals(decoder: Decoder) -> Text:
    count, shared = len(decoder.attentions), len(decoder.attentions) - decoder.cache_entries
    sharing = f" ({shared} with the cache of another)" if shared else ""
    limit = "" if decoder.max_length is None else f", at most {decoder.max_length} tokens"
    size = size_text(decoder.cache_bytes_per_token)
    return Text(f"{count} layers{sharing}, opset {decoder.opset}{limit}; cache size {size} per token")


def _cache_lines(cache: Sequence[CachedTensor]) -> list[Text]:
    """Return a line for each group of cached tensors of the same type, shape and cache mode."""
    groups: dict[str, list[CachedTensor]] = {}
    for one in cache:
        shape = ", ".join(map(str, one.shape))
        given = "" if one.past_length is None else f", past length from `{one.past_length}`"
        by = f", by {one.operator}" if one.operator else ""
        kind = f"{one.dtype} [{shape}], {_CACHE_MODES[one.cache_mode]}{by}{given}"
        groups.setdefault(kind, []).append(one)
    return [
        Text(f"has a cache: {len(ones)} tensors of {kind}: past `{ones[0].past}`, present `{ones[0].present}`")
        for kind, ones in groups.items()
    ]


def _cross_lines(layers: Sequence[CrossAttention]) -> list[Text]:
    """Return a line for each group of cross-attention layers over the same keys."""
    lines: Counter[str] = Counter()
    for one in layers:
        heads = "" if one.kv_heads is None else f", {one.kv_heads} kv heads of {one.head_dim}"
        lines[f"cross-attention, not cached: {one.key_length} keys from {' and '.join(one.inputs)}{heads}"] += 1
    return [Text(f"{count} layers of {line}") for line, count in lines.items()]


def _list(title: str, statements: Sequence[str], sign: str) -> list[Text]:
    return [Text(title), *(Text(f"  {sign} {statement}") for statement in statements)] if statements else []


def _chunks(chunks: tuple[int, ...]) -> str:
    if len(chunks) > 4:
        return f"{chunks[0]}, {chunks[1]}, ... {chunks[-1]} ({len(chunks)})"
    return ", ".join(map(str, chunks))


def _coverage_lines(report: Report) -> list[str]:
    """Return what was compared, and how to repeat it."""
    if not report.comparisons:
        return []
    return [f"coverage: {report.coverage}", f"repeat: --effort {report.effort} --seed {report.seed}"]


def _largest_error(report: Report) -> str:
    if report.error is None:
        return "nothing was compared"
    allowed = f"{report.bound:.0e} for {report.arithmetic}"
    return f"largest error {report.error:.1e} of the spread of the outputs (allowed {allowed}), {report.seconds:.1f} s"
