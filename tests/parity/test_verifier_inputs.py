"""The verifier on other inputs: static batch and length, int32, embeddings."""

import broken_decoders as broken
import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder

from kvsurgeon import io
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

PADDED = Config(layers=2, windowed=(1,))
STATIC = Config(layers=2, windowed=(1,), static=(1, 24))
STATIC_BATCH = Config(layers=2, windowed=(1,), static=(3, 24))
MISTAKES = [
    broken.WrongAxis, broken.NewFirst, broken.MissingOffset, broken.StaleRotary, broken.SwappedKeyValue,
    broken.WrongCorner, broken.LayerWithoutCache, broken.PaddingIgnored, broken.PastPaddingIgnored, broken.PastTiled,
    broken.WithoutLastToken,
]  # fmt: skip


def unchanged(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def with_int32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Declare IDs and mask as int32, and cast them to int64."""
    for value in [value for value in model.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.INT64]:
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32
        _replace_input(model, value.name, f"{value.name}_wide")
        cast = onnx.helper.make_node("Cast", [value.name], [f"{value.name}_wide"], to=onnx.TensorProto.INT64)
        model.graph.node.insert(0, cast)
    return model


def with_embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Declare embeddings as the input."""
    ids = next(value for value in model.graph.input if value.name == "input_ids")
    lookup = next(node for node in model.graph.node if node.op_type == "Gather" and node.input[1] == ids.name)
    width = next(tensor.dims[1] for tensor in model.graph.initializer if tensor.name == lookup.input[0])
    ids.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    ids.type.tensor_type.shape.dim.add().dim_value = width
    ids.name = "inputs_embeds"
    _replace_input(model, lookup.output[0], ids.name)
    _replace_input(model, "input_ids", ids.name)
    model.graph.node.remove(lookup)
    return model


def with_a_fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Set the batch size to 3."""
    for value in [*model.graph.input, *model.graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in ("batch", "batch_size"):
                size.dim_value = 3
    return model


def _replace_input(model: onnx.ModelProto, name: str, other: str) -> None:
    for node in model.graph.node:
        node.input[:] = [other if read == name else read for read in node.input]


FORMS = [
    pytest.param(unchanged, STATIC, id="static batch and length"),
    pytest.param(unchanged, STATIC_BATCH, id="static batch of three"),
    pytest.param(with_a_fixed_batch, STATIC_BATCH, id="fixed batch for a static reference"),
    pytest.param(with_a_fixed_batch, PADDED, id="fixed batch"),
    pytest.param(with_int32, PADDED, id="int32"),
    pytest.param(with_int32, STATIC, id="static int32"),
    pytest.param(with_embeddings, PADDED, id="embeddings"),
    pytest.param(with_embeddings, STATIC, id="static embeddings"),
]


@pytest.mark.parametrize(("form", "config"), FORMS)
def test_accepts_a_correct_cache(form, config):
    report = verify(form(Decoder(config).model()), form(CachedDecoder(config).model()), threads=1, effort="quick")

    assert report.problems == ()
    assert {"token by token", "ragged chunks", "left padding"} <= {
        comparison.scenario for comparison in report.comparisons
    }
    assert {one.verdict for one in report.comparisons} == {"same"}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(("form", "config"), FORMS)
def test_rejects_a_wrong_cache(form, config, mistake):
    report = verify(
        form(Decoder(config).model()), form(mistake(config).model()), threads=1, explain=False, effort="quick"
    )

    assert report.verdict == "different"


def with_memory(form, reduction="ReduceMean", **sizes):
    """Return a decoder that adds a text of its own length, and a row of a table for each row of the batch."""

    class WithMemory(form):
        def declare(self):
            super().declare()
            batch, _ = self.token_dims()
            length = sizes.get("memory_length", "memory_length")
            self.graph.input("memory", onnx.TensorProto.FLOAT, [batch, length, self.config.hidden])
            self.graph.input("speaker", onnx.TensorProto.INT64, [batch])

        def norm(self, hidden):
            if hidden != "layers.0.after_attention":
                return super().norm(hidden)
            axis = self.graph.constant([1])
            text = self.graph.op(reduction, "memory", axis, keepdims=1)
            table = self.graph.constant(np.linspace(0, 3, 2 * self.config.hidden).reshape(2, 1, -1), "float32")
            both = self.graph.op("Add", text, self.graph.op("Gather", table, "speaker"))
            return super().norm(self.graph.op("Add", hidden, both))

    return WithMemory(PADDED).model()


@pytest.mark.parametrize("sizes", [{}, {"memory_length": 9}], ids=["named", "fixed"])
def test_axes_of_other_names_and_sizes_are_fed_separately(sizes):
    report = verify(with_memory(Decoder, **sizes), with_memory(CachedDecoder, **sizes), threads=1, effort="quick")
    wrong = with_memory(CachedDecoder, "ReduceMax", **sizes)

    assert (report.verdict, report.problems) == ("same", ())
    assert max(one.length for one in report.comparisons) == 96
    assert verify(with_memory(Decoder, **sizes), wrong, threads=1, effort="quick").verdict == "different"


def test_a_reference_with_buffers_of_fixed_rows_reads_whole_texts():
    subject = Subject.of(Decoder(PADDED).model())
    Inject(cache="static", max_length=40).apply(subject)
    report = verify(io.to_proto(subject.model), Decoder(PADDED).model(), threads=1, effort="quick")
    assert report.verdict == "same"
    assert max(one.length for one in report.comparisons) > 20
