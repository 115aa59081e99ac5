"""Write the report page from templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any

from kvsurgeon.anatomy import Attention, Decoder
from kvsurgeon.errors import KvsurgeonError, UsageError
from kvsurgeon.parity import Report
from kvsurgeon.reporting.layer_ranges import group_layers, ranges_text
from kvsurgeon.reporting.page.attention_graph import AttentionGraph
from kvsurgeon.reporting.page.embedded import embedded_keys, embedded_weights
from kvsurgeon.reporting.page.sides import Side
from kvsurgeon.reporting.table import mask_text, size_text
from kvsurgeon.runtime.text import Prompt

if TYPE_CHECKING:
    from kvsurgeon.reporting.page.layered_drawing import Drawing

LayerRow = tuple[list[int], Attention, list[int]]  # equal layers, one of them, the layers whose cache they share
_LENGTHS = (1, 1024, 8192, 32768)  # tokens of the sequences whose cache is stated
_MEANING = {
    "causal": "No query gives weight to a later key.",
    "prefix-stable": "Masks and positions of a token do not depend on later tokens.",
    "padding": "Masked tokens do not affect the others.",
    "batch": "The mask of a sequence does not affect other sequences.",
}


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Options of a page.

    Attributes:
        prompt: A text, or token IDs, for attention weights and keys; None for a short text.
        tokens: Number of generated tokens whose time is measured; 0 to run no model.
        verification: The verification of the second model against the first one.
        note: A remark on the models.
    """

    prompt: Prompt | None = None
    tokens: int = 32
    verification: Report | None = None
    note: str | None = None


def render_page(sides: Sequence[Side], measured: Sequence[Side], options: PageOptions) -> str:
    """Return the page on one model, or on two.

    Args:
        sides: The models before and after, or one.
        measured: Those of them whose attention weights and keys are shown.
        options: What the page shows.

    Raises:
        UsageError: jinja2 is not installed.
        UnsupportedError: A model is not a causal decoder that can be handled soundly.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UsageError("expected jinja2 for a report, found none; run: pip install 'kvsurgeon[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvsurgeon.reporting.page"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    filters = {"size": size_text, "mask": mask_text, "ranges": ranges_text, "milliseconds": _milliseconds}
    environment.filters |= filters
    content = page_content(sides, measured, options)
    return environment.get_template("page.html.jinja").render(content)


def page_content(sides: Sequence[Side], measured: Sequence[Side], options: PageOptions) -> dict[str, Any]:
    """Return the values of the template."""
    from kvsurgeon.reporting.page.mask_pictures import two_lengths_pictures

    runs = options.tokens > 0
    return {
        "version": version("kvsurgeon"),
        "sides": sides,
        "decoder": sides[0].decoder,
        "heads": _changes(
            _distinct(f"{one.query_heads} / {one.kv_heads}" for one in side.decoder.attentions) for side in sides
        ),
        "head_dims": _distinct(str(one.head_dim) for one in sides[0].decoder.attentions),
        "layers": _tables(sides),
        "lengths": _LENGTHS,
        "caches": [_cache(side, stated=side.has_cache or len(measured) == len(sides)) for side in sides],
        "masks": list(_masks(sides[0])),
        "two_lengths": two_lengths_pictures(),
        "proofs": [side.proof for side in sides],
        "meaning": _MEANING,
        "verification": options.verification,
        "note": options.note,
        "times": _times(sides, options) if runs else None,
        "graphs": list(_graphs(sides)),
        "data": [_data(side, options.prompt) for side in measured] if runs else [],
    }


def _distinct(texts: Iterable[str]) -> str:
    """Return a text that is the same for all layers, or two of them, or that there are more."""
    found = list(dict.fromkeys(texts))
    return ", ".join(found) if len(found) < 3 else "by layer"


def _milliseconds(value: float) -> str:
    """Return a number with three digits, or all digits before the point.

    >>> _milliseconds(1.2345), _milliseconds(1016.2)
    ('1.23', '1,016')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _changes(texts: Iterable[str]) -> str:
    """Return the text of each model, once if they are equal."""
    return " → ".join(dict.fromkeys(texts))


def _tables(sides: Sequence[Side]) -> list[tuple[str, list[LayerRow]]]:
    """Return the rows of the layers of each model, below its name; one table if all are equal."""
    tables = [(side.name, list(_layers(side.decoder))) for side in sides]
    facts = {tuple(map(_facts, side.decoder.attentions)) for side in sides}
    return tables if len(facts) > 1 else [("", tables[0][1])]


def _layers(decoder: Decoder) -> Iterator[LayerRow]:
    """Yield the numbers of equal layers, one of them, and the layers whose cache they share."""
    attentions = decoder.attentions
    for layers in group_layers(map(_facts, attentions)).values():
        shared = {attentions[layer].shares_cache_with for layer in layers}
        yield layers, attentions[layers[0]], sorted(owner for owner in shared if owner is not None)


def _facts(one: Attention) -> tuple[object, ...]:
    """Return what a row of the table shows."""
    scale = None if one.scale is None else f"{one.scale:.4g}"
    return (
        one.query_heads, one.kv_heads, one.head_dim, one.value_head_dim, scale, one.softcap, one.mask, one.rotary_dim,
        one.key_cache.dtype, one.key_cache.bytes_per_token, one.value_cache.bytes_per_token,
        one.shares_cache_with is None,
    )  # fmt: skip


def _cache(side: Side, *, stated: bool) -> dict[str, Any]:
    """Return the size of a cache; `stated` is false for a model that is shown next to itself with a cache."""
    size = side.cache_size
    modes = sorted({one.cache_mode for one in side.decoder.cache})
    sizes = [size.of(length) for length in _LENGTHS]
    return {"has": side.has_cache, "stated": stated, "per_token": size.per_token, "bytes": sizes, "modes": modes}


def _masks(side: Side) -> Iterator[dict[str, Any]]:
    from kvsurgeon.reporting.page.mask_pictures import mask_picture

    attentions = side.decoder.attentions
    for mask, layers in group_layers(one.mask for one in attentions).items():
        picture, tokens = mask_picture(mask, side.proof.patterns[layers[0]])
        yield {"mask": mask, "layers": layers, "picture": picture, "tokens": tokens}


def _times(sides: Sequence[Side], options: PageOptions) -> dict[str, Any]:
    from kvsurgeon.reporting.page.time_chart import time_chart

    found = [(side.name, side.generation(options.prompt, options.tokens)) for side in sides]
    errors = [f"{name}: {made}" for name, made in found if isinstance(made, KvsurgeonError)]
    times = {name: made.step_seconds for name, made in found if not isinstance(made, KvsurgeonError)}
    series = {name: steps for name, steps in times.items() if steps}
    medians = {name: 1000 * median(steps) for name, steps in series.items()}
    return {"chart": time_chart(series) if series else None, "errors": errors, "medians": medians}


def _graphs(sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
    """Yield the pictures around the attention of one of each group of equal layers, in each model."""
    for layers, _, _ in _layers(sides[0].decoder):
        layer = layers[0]
        shown = [side for side in sides if layer < len(side.decoder.attentions)]
        graphs = [side.attention_graph(layer) for side in shown]
        drawings = list(_drawings(graphs))
        width = max((one.width for one in drawings if not isinstance(one, str)), default=0)
        pictures = list(zip((side.name for side in shown), drawings, strict=True))
        yield {"layers": layers, "layer": layer, "pictures": pictures, "width": width}


def _drawings(graphs: Sequence[AttentionGraph | str]) -> Iterator[Drawing | str]:
    """Yield the drawing of each graph, with what the other one lacks marked, or why there is none."""
    from kvsurgeon.reporting.page.layered_drawing import draw_graph

    for number, graph in enumerate(graphs):
        other = graphs[1 - number] if len(graphs) > 1 else graph
        if isinstance(graph, str):
            yield graph
        else:
            known = graph.vertices if isinstance(other, str) else other.vertices
            yield draw_graph(graph, set(graph.vertices) - set(known))


def _data(side: Side, prompt: Prompt | None) -> dict[str, Any]:
    return {
        "name": side.name,
        "weights": embedded_weights(side.attention_weights(prompt)),
        "keys": embedded_keys(side.keys(prompt)),
    }
