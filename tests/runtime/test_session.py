"""Sessions open from files, folders and memory; errors are one line."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoders import CachedDecoder as CachedModel
from decoders import Config, Decoder

from kvsurgeon.errors import (
    BrokenCacheError,
    InputError,
    InvalidModelError,
    MissingKernelError,
    RunError,
    UsageError,
    WeightsError,
)
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.runtime.tensors import from_runtime, to_runtime


def one_line(error):
    return "\n" not in str(error.value) and "[ONNXRuntimeError]" not in str(error.value)


def test_a_model_opens_from_a_file_a_folder_and_bytes(tmp_path):
    onnx.save(
        Decoder().model(), tmp_path / "model.onnx", save_as_external_data=True, size_threshold=1024, location="weights"
    )
    light = onnx.load(tmp_path / "model.onnx", load_external_data=False)

    sessions = [
        open_session(tmp_path / "model.onnx", threads=1),
        open_session(str(tmp_path), optimization="off"),
        open_session(light, folder=tmp_path, optimization="basic"),
        open_session(Decoder().model()),
    ]
    assert {session.inputs for session in sessions} == {sessions[0].inputs}
    assert [tensor.name for tensor in sessions[0].inputs] == ["input_ids", "attention_mask"]


def test_no_plan_of_memory_is_kept_for_each_length(monkeypatch):
    opened, real = [], ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *args, **options: opened.append(real(*args, **options)) or opened[-1]
    )
    open_session(Decoder().model())
    assert [session.get_session_options().enable_mem_pattern for session in opened] == [False]


def test_opens_the_only_model_of_a_folder(tmp_path):
    onnx.save(Decoder().model(), tmp_path / "decoder.onnx")

    assert open_session(tmp_path).outputs[0].name == "logits"


@pytest.mark.parametrize(("names", "found"), [((), "none"), (("a.onnx", "b.onnx"), "2: a.onnx, b.onnx")])
def test_rejects_a_folder_without_exactly_one_model(tmp_path, names, found):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"found {found}; give the path"):
        open_session(tmp_path)


def test_rejects_a_file_that_is_not_onnx(tmp_path):
    (tmp_path / "model.onnx").write_text("not a model")
    with pytest.raises(InvalidModelError, match=r"[Pp]rotobuf parsing failed") as error:
        open_session(tmp_path)
    assert one_line(error)


def test_names_missing_weights(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(Decoder().model(), path, save_as_external_data=True, size_threshold=1024, location="weights")
    (tmp_path / "weights").unlink()
    with pytest.raises(WeightsError, match="weights") as error:
        open_session(path)
    assert one_line(error)


def test_an_unknown_operator_is_a_missing_kernel():
    model = Decoder().model()
    model.graph.node[0].op_type, model.graph.node[0].domain = "OfNoRuntime", "nobody"
    model.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    with pytest.raises(MissingKernelError, match="OfNoRuntime") as error:
        open_session(model)
    assert one_line(error)


def test_a_model_above_2_gib_must_be_opened_by_path(monkeypatch):
    monkeypatch.setattr("kvsurgeon.runtime.session._LARGEST_MESSAGE", 1000)
    with pytest.raises(UsageError, match="save it and give its path"):
        open_session(Decoder().model())


def test_names_a_failing_operator():
    decoder = CachedDecoder(open_session(CachedModel().model(), threads=1))
    feeds = decoder.inputs.feeds(np.array([[5000]]), np.array([[1]]))
    with pytest.raises(RunError, match=r"Gather `cached/model\.Gather_0`: .*out of data bounds") as error:
        decoder.prefill(feeds)
    assert one_line(error)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.int64, np.bool_, np.uint8, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(2, 3), (2, 0, 3)])
def test_converts_each_type_without_loss(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    there_and_back = from_runtime(to_runtime(array))

    assert there_and_back.dtype == array.dtype
    assert np.array_equal(there_and_back, array)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.uint8])
def test_keeps_a_cache_of_any_type(dtype):
    onnx_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
        g (int64[batch_size, sequence_length] input_ids, {np.dtype(dtype)}[batch_size, past_sequence_length] past)
          => (float[batch_size, sequence_length, 1] logits, {np.dtype(dtype)}[batch_size, total] present)
        <int64[1] two = {{2}}> {{
            new = Cast<to={onnx_type}>(input_ids)
            present = Concat<axis=1>(past, new)
            wide = Unsqueeze(input_ids, two)
            logits = Cast<to=1>(wide)
        }}"""
    model = onnx.parser.parse_model(text)
    decoder = CachedDecoder(open_session(model, threads=1))
    decoder.prefill({"input_ids": np.array([[1, 2]])})
    decoder.step({"input_ids": np.array([[3]])})

    kept = decoder.cached_rows(decoder.cache[0])
    assert (kept.dtype, kept.tolist(), decoder.past_length) == (np.dtype(dtype), [[1, 2, 3]], 3)


def test_reports_a_present_that_lacks_a_token():
    class Lacking(CachedModel):
        def append(self, layer, past, new):
            return new if layer == 2 else super().append(layer, past, new)

        def visible(self, layer):
            return self.graph.constant(True, "bool")

    decoder = CachedDecoder(open_session(Lacking().model(), threads=1))
    feeds = decoder.inputs.feeds(np.array([[1, 2, 3]]), np.ones((1, 3), np.int64))
    decoder.prefill(decoder.inputs.part(feeds, 0, 2))
    with pytest.raises(
        BrokenCacheError,
        match=r"\[batch_size, 2, 3 tokens, 8\] after 1 more, found \[1, 2, 1, 8\] - at `present\.2\.key`",
    ) as error:
        decoder.step(decoder.inputs.part(feeds, 2, 3))
    assert error.value.layer == 2


def test_reports_a_present_that_cannot_be_the_next_past():
    class Swapped(CachedModel):
        """Keys have one head of 16 features in the cache, and come out as two of 8."""

        def declare(self):
            super().declare()
            merged = self.graph.inputs[-2].type.tensor_type.shape.dim
            merged[1].dim_value, merged[3].dim_value = 1, 16

        def append(self, layer, past, new):
            shape = self.graph.constant([0, 2, -1, 8])
            return super().append(layer, self.graph.op("Reshape", past, shape, allowzero=0), new)

    decoder = CachedDecoder(open_session(Swapped(Config(layers=1)).model(), threads=1))
    feeds = decoder.inputs.feeds(np.array([[1]]), np.array([[1]]))
    with pytest.raises(BrokenCacheError, match=r"\[batch_size, 1, 1 tokens, 16\].*found \[1, 2, 1, 8\] - at `present"):
        decoder.prefill(feeds)


def test_prefill_empties_the_cache():
    decoder = CachedDecoder(open_session(CachedModel(Config(layers=1)).model(), threads=1))
    feeds = decoder.inputs.feeds(np.array([[1, 2, 3]]), np.ones((1, 3), np.int64))
    first = decoder.prefill(feeds)

    assert np.array_equal(first, decoder.prefill(feeds))
    assert decoder.past_length == 3
