"""Keys and values that are linear in the attention input of an earlier layer are computed from it without loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from decoders import Config, Decoder
from laws import difference, in_onnxruntime, texts
from unrolled import unrolled

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.heads.swiftkv import SwiftKv

CONFIG = Config(
    layers=3, vocabulary=9, hidden=8, heads=2, kv_heads=1, windowed=()
)  # ranks that a short text determines


class OneInput(Decoder):
    """Later layers project the attention input of layer 1 to keys and values, at twice its size."""

    inputs: tuple[str, ...] = ()

    def heads(self, hidden: str, name: str, count: int, gain: float = 1.0) -> str:
        if name == "query":
            self.inputs = (*self.inputs, hidden)
        elif len(self.inputs) > 2:
            hidden = self.graph.op("Add", self.inputs[1], self.inputs[1])
        return super().heads(hidden, name, count, gain)


class Fused(OneInput):
    """One product computes queries, keys and values, with a bias."""

    def split(self, value: str, sizes: list[int]) -> list[str]:
        graph, ends = self.graph, np.cumsum([0, *sizes])
        bounds = [tuple(graph.constant([number]) for number in (start, end, -1)) for start, end in pairwise(ends)]
        return [graph.op("Slice", value, *bound) for bound in bounds]

    def heads(self, hidden: str, name: str, count: int, gain: float = 1.0) -> str:
        config, graph = self.config, self.graph
        if name == "query":
            width = (config.heads + 2 * config.kv_heads) * config.head_dim
            product = graph.op("MatMul", hidden, self.weight("qkv", config.hidden, width))
            product = graph.op("Add", product, self.weight("bias", 1, width))
            counts = (config.heads, config.kv_heads, config.kv_heads)
            self.parts = self.split(product, [count * config.head_dim for count in counts])
        part = self.parts[["query", "key", "value"].index(name)]
        shape = graph.constant([0, 0, count, config.head_dim])
        return graph.op("Transpose", graph.op("Reshape", part, shape), perm=[0, 2, 1, 3])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 9, 600))))
    return path


def fitted(model: object, after: int, text: Path, *, cached: bool = False) -> tuple[Subject, Changed]:
    subject = Subject.of(model)  # type: ignore[arg-type]
    if cached:
        Inject().apply(subject)
        subject.changed()
    subject.text = text
    outcome = SwiftKv(after=after).apply(subject)
    assert isinstance(outcome, Changed)
    return subject, outcome


def test_keys_and_values_that_are_linear_in_the_input_are_computed_exactly(text: Path) -> None:
    model = OneInput(CONFIG).model()
    subject, outcome = fitted(model, 1, text)
    feeds = texts(model)
    found = in_onnxruntime(io.to_proto(subject.model))(feeds)["logits"]
    assert difference(found, in_onnxruntime(model)(feeds)["logits"]) < 5e-2  # what the ridge takes
    assert not outcome.exact
    assert "of layer 2 is lost" in outcome.notes[0]


def test_fused_projections_keep_their_queries(text: Path) -> None:
    model = Fused(CONFIG).model()
    feeds = texts(model)
    expected = in_onnxruntime(model)(feeds)["logits"]
    errors = []
    for after in (0, 1):
        subject, _ = fitted(model, after, text)
        found = in_onnxruntime(io.to_proto(subject.model))(feeds)["logits"]
        errors.append(float(np.square(found - expected).mean() / expected.var()))
    assert errors[1] < errors[0] < 1


def test_float16_models_stay_float16(text: Path) -> None:
    model = Decoder(replace(CONFIG, dtype="float16")).model()
    subject, _ = fitted(model, 1, text)
    assert in_onnxruntime(io.to_proto(subject.model))(texts(model))["logits"].dtype == np.float16


def test_a_cache_keeps_its_names(text: Path) -> None:
    subject, _ = fitted(Decoder(CONFIG).model(), 0, text, cached=True)
    names = {value.name for value in subject.model.graph.inputs}
    assert {"past_key_values.2.key", "past_key_values.2.value"} <= names


def test_no_text_and_no_layer_are_named(text: Path) -> None:
    model = Decoder(CONFIG).model()
    with pytest.raises(UsageError, match="--text FILE"):
        SwiftKv(after=0).apply(Subject.of(model))
    subject = Subject.of(model)
    subject.text = text
    with pytest.raises(UsageError, match="a layer from 0 to 2, found 3"):
        SwiftKv(after=3).apply(subject)
    assert isinstance(SwiftKv(after=2).apply(subject), Unchanged)


def test_a_model_that_has_states_alone_is_unchanged(text: Path) -> None:
    subject = Subject.of(unrolled())
    subject.text = text
    assert SwiftKv(after=0).apply(subject) == Unchanged(reason="the model has no attention")


def test_keys_that_something_else_reads_are_rejected(text: Path) -> None:
    class Tapped(Decoder):
        """Adds the mean of the keys of the last layer to its input."""

        def attention(self, layer: int, hidden: str) -> str:
            found = super().attention(layer, hidden)
            keys = next(node.output[0] for node in self.graph.nodes[::-1] if node.input[-1].endswith("key"))
            return self.graph.op("Add", found, self.graph.op("ReduceMean", keys, self.graph.constant([-1])))

    subject = Subject.of(Tapped(CONFIG).model())
    subject.text = text
    with pytest.raises(UnsupportedError, match="expected features that only attention reads"):
        SwiftKv(after=1).apply(subject)
