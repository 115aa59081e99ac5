"""Layers whose keys and values are linear in those of another layer read these without loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from decoders import Config, Decoder
from laws import difference, in_onnxruntime, texts

from kvsurgeon import io
from kvsurgeon.errors import UsageError
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.heads.share_kv_layers import ShareKvLayers

CONFIG = Config(layers=2, windowed=(), vocabulary=9)


class Linear(Decoder):
    """Both layers project the embeddings, the second with weights that are those of the first, changed in each head."""

    first = ""
    stored: dict[str, np.ndarray] = {}  # noqa: RUF012

    def heads(self, hidden: str, name: str, count: int, gain: float = 1.0) -> str:
        if name == "query":
            return super().heads(hidden, name, count, gain)
        self.first = self.first or hidden
        return super().heads(self.first, name, count, gain)

    def weight(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        if name not in ("key", "value"):
            return super().weight(name, rows, columns, gain)
        if name not in self.stored:
            self.stored = {**self.stored, name: self._random.standard_normal((rows, columns)) / 4}
            return self.graph.constant(self.stored[name], self.config.dtype, to=name)
        heads = self.stored[name].reshape(rows, -1, self.config.head_dim)
        half = self.config.head_dim // 2
        if name == "key":
            factors = self._random.standard_normal((heads.shape[1], half, 2)) @ [1, 1j]
            rotated = (heads[..., :half] + 1j * heads[..., half:]) * factors
            changed = np.concatenate([rotated.real, rotated.imag], axis=-1)
        else:
            changed = heads @ self._random.standard_normal((self.config.head_dim, self.config.head_dim))
        return self.graph.constant(changed.reshape(rows, columns), self.config.dtype, to=name)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "ids.txt"
    path.write_text(" ".join(map(str, np.random.default_rng(0).integers(0, 9, 240))))
    return path


def test_linear_keys_and_values_are_shared_exactly(text: Path) -> None:
    model = Linear(CONFIG).model()
    feeds = texts(model)
    subject = Subject.of(model)
    subject.text = text
    outcome = ShareKvLayers(kv_layers=1).apply(subject)
    assert isinstance(outcome, Changed)
    assert outcome.cache_bytes is not None
    assert outcome.cache_bytes[0] == 2 * outcome.cache_bytes[1]
    found = in_onnxruntime(io.to_proto(subject.model))(feeds)["logits"]
    assert difference(found, in_onnxruntime(model)(feeds)["logits"]) < 1e-4


def test_least_squares_lose_less_than_the_first_layer_as_it_is(text: Path) -> None:
    model = Decoder(CONFIG).model()
    feeds = texts(model)
    expected = in_onnxruntime(model)(feeds)["logits"]
    errors = []
    for method in ("least-squares", "first"):
        subject = Subject.of(model)
        subject.text = text
        ShareKvLayers(kv_layers=1, method=method).apply(subject)  # type: ignore[arg-type]
        found = in_onnxruntime(io.to_proto(subject.model))(feeds)["logits"]
        errors.append(float(np.square(found - expected).mean()))
    assert errors[0] < 0.9 * errors[1]


def test_least_squares_need_a_text() -> None:
    with pytest.raises(UsageError, match="--text FILE"):
        ShareKvLayers(kv_layers=1, method="least-squares").apply(Subject.of(Decoder(CONFIG).model()))
