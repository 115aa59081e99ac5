"""Tables, text and JSON of facts and reports."""

import io
import json
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from kvsurgeon.anatomy import Attention, CachePointFacts, Decoder, Mask
from kvsurgeon.parity import TOLERANCES, Comparison, Report
from kvsurgeon.reporting import json_output, table, terminal
from kvsurgeon.reporting.encoding import replace_unencodable

LAYOUT = ("batch", "kv_heads", "sequence", "head_dim")
CACHED = CachePointFacts(value="k", dtype="float16", layout=LAYOUT, heads=3, head_dim=64, bytes_per_token=384)
LAYER = Attention(
    layer=0, output="context", scores="scores", query_heads=9, kv_heads=3, head_dim=64, value_head_dim=64, scale=0.125,
    softcap=None, mask=Mask(kind="causal", padding=True), rotary_dim=64, head_repetition=(),
    query=None, key=None, value=None, key_cache=CACHED, value_cache=CACHED,
)  # fmt: skip
DECODER = Decoder(
    attentions=(
        LAYER,
        replace(LAYER, layer=1, mask=Mask(kind="sliding-window", window=4), rotary_dim=16, softcap=50.0),
        replace(
            LAYER, layer=2, mask=Mask(kind="causal", bias=True), rotary_dim=None, scale=None, shares_cache_with=1,
            value_head_dim=32,
        ),
    ),
    inputs=(), opset=20, max_length=2048, proved=("attention is causal",), assumed=("experts are chosen by token",),
)  # fmt: skip


def shown(renderable, width=200):
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def rows(text):
    return [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]


def test_a_decoder_has_a_row_for_each_layer_and_totals():
    text = shown(table.decoder_table(DECODER))
    first, second, third = [" ".join(row) for row in rows(text)[:3]]
    assert first == "0 9 3 64 0.125 causal + padding 64 k float16 768"
    assert second == "1 9 3 64 0.125 sliding window 4 + softcap 50 16 of 64 k float16 768"
    assert third == "2 9 3 64/32 - causal + bias - as layer 1 0"
    assert "3 layers (1 with the cache of another), opset 20, at most 2048 tokens; cache size 1.5 KiB per token" in text
    assert "✓ attention is causal" in text
    assert "? experts are chosen by token" in text


def test_empty_lists_are_omitted():
    text = shown(table.decoder_table(replace(DECODER, proved=(), assumed=(), max_length=None)))
    assert "proved" not in text
    assert "assumed" not in text
    assert "at most" not in text


def test_names_that_look_like_markup_are_escaped():
    cached = replace(CACHED, value="[red]k[/red]")
    text = shown(table.decoder_table(replace(DECODER, attentions=(replace(LAYER, key_cache=cached),))))
    assert "[red]k[/red]" in text


def test_json_has_the_same_facts():
    facts = json.loads(json.dumps(json_output.decoder_json(DECODER)))
    assert (facts["cache_entries"], facts["cache_bytes_per_token"]) == (2, 1536)
    assert facts["attentions"][1]["mask"]["window"] == 4


COMPARISON = Comparison(
    scenario="ragged", batch=3, length=24, chunks=(5, 1, 1, 1, 16), verdict="same", error=2e-6, agreement=1.0
)


def test_a_report_has_a_row_for_each_scenario():
    report = Report(arithmetic="float32", tolerance=TOLERANCES["float32"], comparisons=(COMPARISON,), seconds=1.25)
    text = shown(table.report_table(report))
    assert "5, 1, ... 16 (5)" in text
    assert "100.0%" in text
    assert "same: largest error 2.0e-06 of the spread of the outputs (allowed 3e-04 for float32), 1.2 s" in text


def test_problems_are_listed():
    wrong = replace(COMPARISON, verdict="different", error=0.5, reason="layer 1 forgets")
    text = shown(
        table.report_table(Report(arithmetic="float32", tolerance=TOLERANCES["float32"], comparisons=(wrong,)))
    )
    assert "✗ ragged: layer 1 forgets" in text


def test_equal_layers_have_one_row():
    layers = [
        replace(LAYER, layer=layer, key_cache=replace(CACHED, value=f"k{layer}"), rotary_dim=None if layer == 3 else 64)
        for layer in range(8)
    ]
    text = shown(table.decoder_table(replace(DECODER, attentions=(*layers,))))
    assert [" ".join(row) for row in rows(text)[:2]] == [
        "0-2, 4-7 9 3 64 0.125 causal + padding 64 k0 ... k7 float16 768",
        "3 9 3 64 0.125 causal + padding - k3 float16 768",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_nothing_is_cut(width):
    names = replace(CACHED, value="/model/layers.0/self_attn/Concat_7_output_0")
    layer = replace(LAYER, key_cache=names, mask=Mask(kind="sliding-window", window=4, padding=True))
    report = Report(arithmetic="float32", tolerance=TOLERANCES["float32"], comparisons=(COMPARISON,), seconds=1.25)
    passes = ({"name": "separate-cross-attention", "summary": "Compute keys in a model.", "package": "kvsurgeon"},)
    for found in (
        table.decoder_table(replace(DECODER, attentions=(layer,))),
        table.report_table(report),
        table.passes_table(passes),
    ):
        text = shown(found, width)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        words = set(text.split())
    assert {"separate-cross-attention", "Compute", "kvsurgeon"} <= words
    assert names.value in shown(table.decoder_table(replace(DECODER, attentions=(layer,))), width)


def test_characters_that_an_encoding_lacks_are_replaced(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    replace_unencodable()
    terminal.console().print(table.decoder_table(replace(DECODER, assumed=("40 °C",))))
    sys.stdout.flush()
    text = written.getvalue().decode()
    assert "+ attention is causal" in text
    assert r"? 40 \xb0C" in text


def test_no_color_is_respected(monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with (console := terminal.console()).capture() as capture:
        console.print("[red]red[/]")
    assert capture.get() == "red\n"


def test_lines_are_not_wrapped_in_a_pipe(capsys):
    terminal.console().print("x y " * 150)
    assert capsys.readouterr().out == "x y " * 150 + "\n"


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 40, "3072.0 GiB")])
def test_sizes(count, words):
    assert table.size_text(count) == words
