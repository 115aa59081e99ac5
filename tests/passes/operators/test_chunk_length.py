"""chunk-length divides a recurrence into chunks of another length, and changes nothing else."""

import numpy as np
import pytest
from attentions import attention
from laws import ALLOWED, assert_law, difference, dims_of, in_onnxruntime, texts
from recurrences import hybrid, layers, scan
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.chunk_length import ChunkLength

DECAYING = scan(**{"a0 = Mul(la,": "lb = Abs(la)\n lc = Neg(lb)\n a0 = Mul(lc,"})


def test_chunks_of_another_length_give_the_same():
    original = read(hybrid(layers(DECAYING, "h = Tanh(x)", DECAYING)))
    subject = Subject.of(original)
    assert isinstance(ChunkLength(tokens=2).apply(subject), Changed)
    changed = io.to_proto(subject.model)
    assert {value.name: dims_of(value) for value in changed.graph.input} == {"x": ["b", "n", 8]}
    for length in (2, 3, 4, 5, 13):
        feeds = texts(original, length=length)
        one, other = (in_onnxruntime(model)(feeds)["logits"] for model in (original, changed))
        assert difference(other, one) <= ALLOWED["float32"]
    Inject().apply(subject)
    assert_law(original, io.to_proto(subject.model), whole=texts(original, length=9), cuts=[1, 2, 4, 5])


def test_a_step_computes_fewer_rows():
    sizes = []
    for passes in ((Inject(),), (ChunkLength(tokens=2), Inject())):
        subject = Subject.of(read(hybrid(DECAYING)))
        for one in passes:
            one.apply(subject)
        model = io.to_proto(subject.model)
        inner = next(node.output[0] for node in model.graph.node if node.output[0].startswith("decays"))
        model.graph.output.append(type(model.graph.output[0])(name=inner))
        feeds = {"x": np.ones((1, 1, 8), np.float32)}
        for value in model.graph.input[1:]:
            shape = [{"batch_size": 1, "past_sequence_length": 3}.get(size, size) for size in dims_of(value)]
            feeds[value.name] = np.ones(shape, np.float32)
        sizes.append(in_onnxruntime(model)(feeds)[inner].shape)
    assert sizes == [(1, 1, 4, 4), (1, 1, 2, 2)]


def test_a_size_that_is_the_same_number_is_rejected():
    text = hybrid(DECAYING).replace("int64 four = {4}", "int64 four = {8}").replace("0, -1, 4,", "0, -1, 8,")
    original = read(text)
    subject = Subject.of(original)
    before = io.to_proto(subject.model)
    with pytest.raises(UnsupportedError, match="cannot be divided into chunks of another length"):
        ChunkLength(tokens=2).apply(subject)
    assert io.to_proto(subject.model) == before


@pytest.mark.parametrize("text", [attention(), hybrid(DECAYING)])
def test_a_model_without_longer_chunks_is_unchanged(text):
    assert isinstance(ChunkLength(tokens=4).apply(Subject.of(read(text))), Unchanged)
