"""The judge attacked through inputs of other kinds: static batch and length, 32-bit integers, embeddings."""

import broken_decoders as shelf
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder

from kvsurgeon.parity import verify

PADDED = Config(layers=2, windowed=(1,))
STATIC = Config(layers=2, windowed=(1,), static=(1, 24))
STATIC_BATCH = Config(layers=2, windowed=(1,), static=(3, 24))
MISTAKES = [
    shelf.WrongAxis, shelf.NewFirst, shelf.ForgottenOffset, shelf.StaleRotary, shelf.SwappedKeyValue, shelf.WrongCorner,
    shelf.LayerWithoutCache, shelf.PaddingIgnored, shelf.PaddingForgotten, shelf.PastTiled, shelf.WithoutNewest,
]  # fmt: skip


def as_it_is(model: onnx.ModelProto) -> onnx.ModelProto:
    return model


def with_integers_of_32_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Ids and mask are int32; what reads them is given the int64 that it expects."""
    for value in [value for value in model.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.INT64]:
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32
        _read_instead(model, value.name, f"{value.name}_wide")
        cast = onnx.helper.make_node("Cast", [value.name], [f"{value.name}_wide"], to=onnx.TensorProto.INT64)
        model.graph.node.insert(0, cast)
    return model


def with_embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
    """The text is given as what the embeddings hold for it."""
    ids = next(value for value in model.graph.input if value.name == "input_ids")
    lookup = next(node for node in model.graph.node if node.op_type == "Gather" and node.input[1] == ids.name)
    width = next(tensor.dims[1] for tensor in model.graph.initializer if tensor.name == lookup.input[0])
    ids.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    ids.type.tensor_type.shape.dim.add().dim_value = width
    ids.name = "inputs_embeds"
    _read_instead(model, lookup.output[0], ids.name)
    _read_instead(model, "input_ids", ids.name)
    model.graph.node.remove(lookup)
    return model


def with_a_fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """What is called `batch_size` is 3; a static original is of that batch too."""
    for value in [*model.graph.input, *model.graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in ("batch", "batch_size"):
                size.dim_value = 3
    return model


def _read_instead(model: onnx.ModelProto, name: str, other: str) -> None:
    for node in model.graph.node:
        node.input[:] = [other if read == name else read for read in node.input]


FORMS = [
    pytest.param(as_it_is, STATIC, id="static batch and length"),
    pytest.param(as_it_is, STATIC_BATCH, id="static batch of three"),
    pytest.param(with_a_fixed_batch, STATIC_BATCH, id="a cache of a fixed batch for a static original"),
    pytest.param(with_a_fixed_batch, PADDED, id="a fixed batch"),
    pytest.param(with_integers_of_32_bits, PADDED, id="int32"),
    pytest.param(with_integers_of_32_bits, STATIC, id="static int32"),
    pytest.param(with_embeddings, PADDED, id="embeddings"),
    pytest.param(with_embeddings, STATIC, id="static embeddings"),
]


@pytest.mark.parametrize(("form", "config"), FORMS)
def test_a_right_cache_is_accepted(form, config):
    report = verify(form(Decoder(config).model()), form(CachedDecoder(config).model()), threads=1)

    assert report.problems == ()
    assert {"token by token", "ragged chunks", "left padding"} <= {trial.scenario for trial in report.trials}
    assert {trial.verdict for trial in report.trials} == {"same"}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(("form", "config"), FORMS)
def test_a_wrong_cache_is_rejected(form, config, mistake):
    report = verify(form(Decoder(config).model()), form(mistake(config).model()), threads=1, explain=False)

    assert report.verdict == "different"
