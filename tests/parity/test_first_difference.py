"""The first difference of two graphs is named if it can be found."""

import broken_decoders as broken
import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Decoder

from kvsurgeon.parity import verify
from kvsurgeon.parity.chunked_run import ChunkedRun
from kvsurgeon.parity.comparison import compare_caches
from kvsurgeon.runtime import ValueInfo
from kvsurgeon.runtime.axes import cache_entries


def renamed(model):
    """Rename all inner values."""
    kept = {value.name for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if not name or name in kept else f"other/{name}" for name in names]
    return model


def test_names_no_value_if_the_graphs_share_none():
    report = verify(Decoder().model(), renamed(broken.WrongCorner().model()), threads=1)

    assert (report.layer, report.first_difference) == (1, None)


def test_names_no_value_if_a_graph_cannot_be_opened_twice(monkeypatch, tmp_path):
    onnx.save(Decoder().model(), tmp_path / "reference.onnx")
    onnx.save(broken.WrongCorner().model(), tmp_path / "broken.onnx")
    monkeypatch.setattr("kvsurgeon.runtime.session._LARGEST_MESSAGE", 1000)  # as if it exceeded 2 GB
    report = verify(tmp_path / "reference.onnx", tmp_path / "broken.onnx", threads=1)

    assert (report.layer, report.first_difference) == (1, None)


def test_ignores_values_of_other_shapes_and_those_that_are_nan_in_both():
    class Odd:
        def attention(self, layer, hidden):
            infinity = self.number(float("inf"))
            self.graph.op("Sub", infinity, infinity, to="undefined")
            self.graph.op("Expand", infinity, self.graph.constant(self.shape), to="shaped")
            return super().attention(layer, hidden)

    class OddReference(Odd, Decoder):
        shape = (2, 3)

    class OddBroken(Odd, broken.WrongCorner):
        shape = (3, 2)

    assert verify(OddReference().model(), OddBroken().model(), threads=1).first_difference == "layers.1.context"


def test_searches_only_if_requested():
    report = verify(Decoder().model(), broken.WrongCorner().model(), threads=1, explain=False)

    assert (report.layer, report.first_difference) == (1, None)
    assert verify(Decoder().model(), CachedDecoder().model(), threads=1).first_difference is None


@pytest.mark.parametrize(("heads", "wrong"), [(2, 0), (3, 1)])
def test_a_cache_whose_head_count_depends_on_the_chunks_differs(heads, wrong):
    dims = ("batch_size", "heads", "past_sequence_length", 4)
    past = ValueInfo(name="past_key_values.0.key", dtype=np.dtype("float32"), dims=dims)
    entries = cache_entries([past], [past])
    whole, chunked = (
        ChunkedRun(spans=(), outputs=(), cache={past.name: np.ones((1, size, 5, 4))}) for size in (2, heads)
    )

    differences = compare_caches(entries, whole, chunked, np.ones((1, 5), bool), 1e-4)

    assert len(differences) == wrong


@pytest.mark.parametrize(
    ("changed", "step", "wrong"), [(0, 0, 0), (1, 1, 0), (1, 16, 0), (1, 15, 0), (1, 2, 1), (1, 100, 1), (9, 1, 1)]
)
def test_few_integers_of_a_cache_may_be_rounded_otherwise(changed, step, wrong):
    dims = ("batch_size", 2, "past_sequence_length", 8)
    past = ValueInfo(name="past_key_values.0.key", dtype=np.dtype("int8"), dims=dims)
    whole = np.random.default_rng(0).integers(-20, 20, (1, 2, 50, 8)).astype(np.int8)
    found = whole.copy()
    found[0, 0, :changed, 3] += step
    runs = (ChunkedRun(spans=(), outputs=(), cache={past.name: one}) for one in (whole, found))

    differences = compare_caches(cache_entries([past], [past]), *runs, np.ones((1, 50), bool), 1e-4)

    assert len(differences) == wrong
