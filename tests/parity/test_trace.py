"""The place where two graphs part is a hint: named where it can be found, and never a crash."""

import broken_decoders as shelf
import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Decoder

from kvsurgeon.parity import verify
from kvsurgeon.parity.chunked_run import Performance
from kvsurgeon.parity.comparison import cache_faults
from kvsurgeon.runtime import Tensor, cache_entries


def renamed(model):
    """Give every value within the model a name of its own."""
    kept = {value.name for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if not name or name in kept else f"other/{name}" for name in names]
    return model


def test_graphs_that_share_no_names_are_judged_without_a_place():
    report = verify(Decoder().model(), renamed(shelf.WrongCorner().model()), threads=1)

    assert (report.layer, report.first_difference) == (1, None)


def test_a_graph_that_cannot_be_opened_twice_is_judged_without_a_place(monkeypatch, tmp_path):
    onnx.save(Decoder().model(), tmp_path / "original.onnx")
    onnx.save(shelf.WrongCorner().model(), tmp_path / "broken.onnx")
    monkeypatch.setattr("kvsurgeon.runtime.session._LARGEST_MESSAGE", 1000)  # as if it had 2 GB within
    report = verify(tmp_path / "original.onnx", tmp_path / "broken.onnx", threads=1)

    assert (report.layer, report.first_difference) == (1, None)


def test_values_that_differ_in_shape_or_are_undefined_in_both_are_passed_over():
    class Odd:
        def attention(self, layer, hidden):
            infinity = self.number(float("inf"))
            self.graph.op("Sub", infinity, infinity, to="undefined")
            self.graph.op("Expand", infinity, self.graph.constant(self.shape), to="shaped")
            return super().attention(layer, hidden)

    class OddOriginal(Odd, Decoder):
        shape = (2, 3)

    class OddBroken(Odd, shelf.WrongCorner):
        shape = (3, 2)

    assert verify(OddOriginal().model(), OddBroken().model(), threads=1).first_difference == "layers.1.context"


def test_nothing_is_looked_for_unless_asked():
    report = verify(Decoder().model(), shelf.WrongCorner().model(), threads=1, explain=False)

    assert (report.layer, report.first_difference) == (1, None)
    assert verify(Decoder().model(), CachedDecoder().model(), threads=1).first_difference is None


@pytest.mark.parametrize(("heads", "wrong"), [(2, 0), (3, 1)])
def test_a_cache_whose_other_sizes_depend_on_the_chunks_is_wrong(heads, wrong):
    dims = ("batch_size", "heads", "past_sequence_length", 4)
    past = Tensor(name="past_key_values.0.key", dtype=np.dtype("float32"), dims=dims)
    entries = cache_entries([past], [past])
    whole, chunked = (Performance(calls=(), cache={past.name: np.ones((1, size, 5, 4))}) for size in (2, heads))

    faults = cache_faults(entries, whole, chunked, np.ones((1, 5), bool), 1e-4)

    assert len(faults) == wrong
