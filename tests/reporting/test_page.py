"""The report page: one file without references, whose numbers are those of the model."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder

import kvsurgeon
from kvsurgeon.anatomy import Mask
from kvsurgeon.cache.sizes import CacheSize, cache_size
from kvsurgeon.cli.main import run
from kvsurgeon.errors import KvsurgeonError, UnsupportedError
from kvsurgeon.passes.contract import Subject
from kvsurgeon.proof.attention.attention_pattern import AttentionPattern
from kvsurgeon.reporting.layer_ranges import group_layers
from kvsurgeon.reporting.page.attention_graph import AttentionGraph, Vertex
from kvsurgeon.reporting.page.embedded import embedded_keys, embedded_weights
from kvsurgeon.reporting.page.layered_drawing import draw_graph
from kvsurgeon.reporting.page.mask_pictures import mask_picture
from kvsurgeon.reporting.page.sides import Side
from kvsurgeon.workflow.attention_weights import AttentionWeights, capture_attention_weights
from kvsurgeon.workflow.keys import Keys, capture_keys
from kvsurgeon.workflow.pipeline import Pipeline

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A parsed page: elements must nest, and nothing may be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.references: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.script: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.references += [(tag, name) for name in ("src", "srcset", "action", "data") if name in found]
        self.references += [(tag, "href")] if "href" in found and tag != "a" else []
        self.references += [(tag, name) for name in found if name.startswith("on")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.script if self.open and self.open[-1] in ("script", "style") else self.text).append(data)

    @property
    def data(self):
        return json.loads(next(text for text in self.script if text.startswith("[")))

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def page():
    return Page(kvsurgeon.report(DEMO, prompt="It was late.", tokens=4))


def test_the_page_nests_and_loads_nothing(page):
    assert not page.open
    assert not page.references
    assert not [text for text in page.script if re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)]


def test_every_link_leads_to_a_section(page):
    assert len(page.links) > 5
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_states_layers_cache_and_proof(page):
    decoder = kvsurgeon.inspect(DEMO)
    assert f"{len(decoder.attentions)} attention layers" in page.words
    assert "0-5 8 / 2 16 causal + padding" in page.words, "equal layers share a row"
    assert "1,024 none 1.5 MiB" in page.words, "1,024 tokens of 1,536 bytes"
    assert "prefix-stable proved" in page.words
    assert "model with a cache : cache mode dynamic, 12 cached tensors" in page.words


def weights_of(layer, tokens):
    """Decode attention weights as the page does."""
    stored = np.frombuffer(base64.b64decode(layer["data"]), np.uint8).reshape(layer["heads"], -1)
    weights = np.zeros((layer["heads"], tokens, tokens))
    weights[:, *np.tril_indices(tokens)] = (stored / 255.0) ** 2
    return weights


def test_embedded_weights_and_keys_are_those_of_the_model(page):
    (data,) = page.data
    tokens = len(data["weights"]["tokens"])
    captured = capture_attention_weights(DEMO, prompt="It was late.")
    assert len(data["weights"]["layers"]) == 6
    for layer, expected in zip(data["weights"]["layers"], captured.layers, strict=True):
        np.testing.assert_allclose(weights_of(layer, tokens), expected, atol=0.004)
    layer = data["keys"]["layers"][1]
    stored = np.frombuffer(base64.b64decode(layer["data"]), "<i2").reshape(2, tokens, layer["dim"])
    keys = capture_keys(DEMO, layer=1, prompt="It was late.")
    np.testing.assert_allclose(stored * layer["scale"], keys.keys, atol=layer["scale"])
    assert layer["reads"] == list(keys.reads)


def test_names_of_a_model_are_escaped(tmp_path):
    model = Decoder(Config(layers=1)).model()
    hostile = "</script><img src=x onerror=alert(1)>"
    for node in model.graph.node:
        node.input[:] = [hostile if name == "attention_mask" else name for name in node.input]
    model.graph.input[1].name = hostile
    path = tmp_path / "<b>&.onnx"
    onnx.save(model, path)
    page = Page(kvsurgeon.report(path, tokens=1))
    assert not page.open
    assert not page.references
    assert hostile in page.words


def test_a_model_with_a_cache_is_shown_alone(tmp_path):
    onnx.save(CachedDecoder(Config(layers=2)).model(), tmp_path / "cached.onnx")
    alone = Page(kvsurgeon.report(tmp_path / "cached.onnx", tokens=2))
    assert [one["name"] for one in alone.data] == ["cached"]
    assert "1 256 B" in alone.words, "2 layers of 2 heads of 8 floats, keys and values"


def test_a_second_model_is_verified_and_shown_next_to_the_first_one():
    config = Config(layers=2, vocabulary=17)
    page = Page(
        kvsurgeon.report(
            Decoder(config).model(), against=CachedDecoder(config).model(), tokens=0, verify=True, effort="quick"
        )
    )
    assert "Verdict: same" in page.words
    assert "token by token 1" in page.words
    assert "1 256 B 256 B" in page.words, "the size of the cache that inject adds, and that of the second model"
    assert "sliding window 4 + padding layer 1" in page.words.replace("layers 1", "layer 1")


def test_a_model_that_cannot_be_run_gets_a_page_that_says_why():
    model = Decoder(Config(layers=1)).model()
    tensor = next(one for one in model.graph.initializer if one.name == "model.head")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere.data")
    page = Page(kvsurgeon.report(model, tokens=2))
    assert "error" in page.data[0]["weights"]
    assert "error" in page.data[0]["keys"] or all("error" in one for one in page.data[0]["keys"]["layers"])
    assert "Not measured" in page.words


def test_without_tokens_nothing_is_run():
    page = Page(kvsurgeon.report(Decoder(Config(layers=1)).model(), tokens=0))
    assert page.data == []
    assert "attention" not in page.ids


def test_a_model_that_is_no_decoder_is_rejected():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    with pytest.raises(UnsupportedError):
        kvsurgeon.report(model)


def test_the_command_writes_the_page(tmp_path, capsys):
    onnx.save(Decoder(Config(layers=1)).model(), tmp_path / "model.onnx")
    path = tmp_path / "page.html"
    assert run(["report", str(tmp_path / "model.onnx"), "--tokens", "0", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"written to {path}\n"
    assert path.read_text("utf-8").startswith("<!doctype html>")


def test_without_jinja2_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(KvsurgeonError, match=r"kvsurgeon\[report\]"):
        kvsurgeon.report(Decoder(Config(layers=1)).model(), tokens=0)


# Parts


def test_layers_that_share_a_cache_have_one_row(tmp_path):
    pair = kvsurgeon.report(DEMO, against=_shared(tmp_path), tokens=0)
    assert "1, 3, 5 8 / 2 16 causal + padding 16 of 16 0.25 that of layers 0, 2, 4 0 B" in Page(pair).words


def _shared(tmp_path):
    assert run(["share-kv-layers", str(DEMO), "--kv-layers", "3", "--no-verify", "-o", str(tmp_path / "shared")]) == 0
    return tmp_path / "shared"


def test_equal_layers_are_grouped_in_order():
    assert group_layers(["a", "b", "a", "a"]) == {"a": [0, 2, 3], "b": [1]}


def pattern(visible):
    return AttentionPattern(weights=np.asarray(visible, float))


def cells(picture, kind):
    return len(re.findall(f'class="{kind}"', picture))


@pytest.mark.parametrize(
    ("mask", "tokens", "attended"),
    [
        (Mask(kind="causal"), 1, 16 * 17 // 2),
        (Mask(kind="sliding-window", window=4), 1, 6 + 13 * 4),
        (Mask(kind="sliding-window", window=4096), 512, 28 + 9 * 8),
        (Mask(kind="chunked", chunk=4), 1, 4 * 10),
    ],
)
def test_a_mask_is_drawn_to_scale(mask, tokens, attended):
    picture, scale = mask_picture(mask, pattern(np.tri(8)))
    assert (scale, cells(picture, "on"), cells(picture, "off")) == (tokens, attended, 256 - attended)


def test_another_mask_is_drawn_as_measured():
    window_and_sink = np.tri(12) - np.tri(12, k=-3)
    window_and_sink[:, 0] = 1
    picture, _ = mask_picture(Mask(kind="other"), pattern(window_and_sink))
    assert cells(picture, "on") == window_and_sink.sum()


@pytest.mark.parametrize("cached", [False, True])
def test_the_graph_starts_at_projections_and_pasts_and_ends_at_the_output(cached):
    graph = Side((CachedDecoder if cached else Decoder)(Config()).model()).attention_graph(0)
    kinds = [vertex.kind for vertex in graph.vertices.values()]
    assert [kinds.count(kind) for kind in ("projection", "past", "present", "output")] == [3, 2 * cached, 2 * cached, 1]
    operators = [vertex.label for vertex in graph.vertices.values() if vertex.kind == "operator"]
    assert operators.count("Softmax") == 1
    assert operators.count("MatMul") == 2
    assert {name for edge in graph.edges for name in edge} == set(graph.vertices)


def test_an_operator_that_computes_the_whole_attention_is_drawn_with_its_cache():
    injected = kvsurgeon.inject(Decoder(Config(windowed=())).model(), verify=False).model
    fused = Pipeline.parse("fuse-attention").run(Subject.of(injected)).model
    graph = Side(fused).attention_graph(0)
    labels = [vertex.label for vertex in graph.vertices.values() if vertex.kind != "context"]
    assert "GroupQueryAttention" in labels
    assert "attention output" in labels
    assert "present.0.key" in labels
    assert "Softmax" not in labels


def test_boxes_of_a_drawing_do_not_overlap():
    drawing = draw_graph(Side(Decoder(Config()).model()).attention_graph(0))
    boxes = [
        tuple(map(float, box))
        for box in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', str(drawing.content))
    ]
    assert len(boxes) > 20
    for number, (x, y, width) in enumerate(boxes):
        assert x >= 0
        assert x + width <= drawing.width
        for other_x, other_y, other_width in boxes[number + 1 :]:
            assert y != other_y or x + width <= other_x or other_x + other_width <= x


def test_edges_of_a_drawing_lead_down():
    names = "abcd"
    graph = AttentionGraph(
        vertices={name: Vertex(name=name, kind="operator", label=name) for name in names},
        edges=(("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")),
    )
    drawing = draw_graph(graph, changed={"d"})
    heights = {label: float(y) for y, label in re.findall(r'<text x="[\d.]+" y="([\d.]+)">(\w)', str(drawing.content))}
    assert heights["a"] < heights["b"] == heights["d"] < heights["c"]
    assert str(drawing.content).count("changed") == 1


def test_large_models_get_fewer_tokens():
    weights = AttentionWeights(
        tokens=tuple("abcdefghijklmnopqrstuvwx"), layers=(np.full((64, 24, 24), 0.25, np.float32),) * 90
    )
    found = embedded_weights(weights)
    assert 10 < len(found["tokens"]) < 24
    assert sum(len(layer["data"]) for layer in found["layers"]) < 1.4e6
    keys = [
        Keys(model="m", layer=0, reads=tuple(range(32)), keys=np.ones((32, 24, 128), np.float32), tokens=("t",) * 24)
    ] * 60
    found = embedded_keys(keys)
    assert len(found["tokens"]) == 2
    assert sum(len(layer["data"]) for layer in found["layers"]) < 1.4e6


def test_a_buffer_and_growing_rows_have_their_size():
    growing = CacheSize(per_token=384, fixed=0)
    assert cache_size(Subject.of(CachedDecoder(Config()).model()).model.graph) == growing
    assert cache_size(Subject.of(Decoder(Config()).model()).model.graph) == CacheSize(per_token=0, fixed=0)
    static = kvsurgeon.inject(Decoder(Config()).model(), verify=False, cache="static", max_length=64).model
    assert cache_size(static.graph) == CacheSize(per_token=0, fixed=64 * 384)
    assert growing.of(10) == 3840


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_draws_the_page_without_messages(page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.source, "utf-8")
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert 'aria-label="query It"' in done.stdout
    assert "<h4>KV head 1</h4>" in done.stdout
