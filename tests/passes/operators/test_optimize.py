"""Passes that make a decode step faster: joined and transposed weights are right, also in 4 bits and in files."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import after, export, operators
from laws import in_onnxruntime
from onnx import TensorProto, helper, numpy_helper

from kvsurgeon import io
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.operators.optimize import Optimize
from kvsurgeon.passes.operators.pack_projections import PackProjections
from kvsurgeon.passes.operators.store_transposed_weights import StoreTransposedWeights

FLOAT, K, BLOCK = TensorProto.FLOAT, 48, 16


FIXED_ROWS = Inject(cache="static", past_length="mask", max_length=64)


def tied() -> onnx.ModelProto:
    """A decoder whose output projection is the transpose of its embeddings."""
    model = Decoder(Config(layers=2, head_dim=16)).model()
    graph = model.graph
    head = next(node for node in graph.node if "logits" in node.output)
    head = head if head.op_type == "MatMul" else next(node for node in graph.node if head.input[0] in node.output)
    table = next(one.name for one in graph.initializer if list(one.dims) == [61, 32])
    head.input[1] = "transposed"
    graph.node.insert(0, helper.make_node("Transpose", [table], ["transposed"], perm=[1, 0]))
    return model


@pytest.mark.parametrize("padding", ["mask", "lengths"])
@pytest.mark.parametrize("name", ["llama_torchscript_sdpa", "gemma2_torchscript_eager"])
def test_the_fixed_rows_of_a_buffer_are_not_the_length_of_a_text(name, padding):
    result = after(export(name), FIXED_ROWS, Optimize(layers="all", padding=padding))
    assert operators(result).count("GroupQueryAttention") == 2
    report = verify(export(name), result, threads=1)
    assert (report.verdict, report.problems) == ("same", ())


@pytest.mark.parametrize("padding", ["mask", "lengths"])
@pytest.mark.parametrize(("model", "norms"), [(tied(), 0), (export("llama_dynamo_sdpa"), 4)], ids=["tied", "llama"])
def test_an_optimized_decoder_computes_the_same(model, norms, padding):
    result = after(model, Inject(cache="static"), Optimize(padding=padding, max_length=200))
    found = operators(result)
    assert (found.count("GroupQueryAttention"), found.count("SkipSimplifiedLayerNormalization")) == (2, norms)
    assert not any(node.op_type == "Transpose" and node.input[0] == "model.embeddings" for node in result.graph.node)
    assert verify(model, result, threads=1).verdict == "same"
    assert verify(result, after(result, RemoveCache()), threads=1).verdict == "same"


def test_joined_and_transposed_weights_are_read_from_their_files(tmp_path):
    model, folder = tied(), tmp_path / "external"
    folder.mkdir()
    onnx.save(tied(), folder / "model.onnx", save_as_external_data=True, size_threshold=0, location="weights")
    subject = Subject.of(folder / "model.onnx")
    for one in (PackProjections(), StoreTransposedWeights()):
        one.apply(subject)
        subject.changed()
    io.save(subject.model, tmp_path / "out" / "model.onnx")
    expected = after(model, PackProjections(), StoreTransposedWeights())
    saved = onnx.load(tmp_path / "out" / "model.onnx")
    weights = {one.name: numpy_helper.to_array(one) for one in saved.graph.initializer}
    changed = [one for one in expected.graph.initializer if one.name.endswith((".packed", ".transposed"))]
    assert len(changed) == 3  # queries, keys and values of two layers, and the output projection
    assert all(np.array_equal(weights[one.name], numpy_helper.to_array(one)) for one in changed)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("zero_points", [False, True])
def test_blocks_of_four_bits_are_joined(flat, zero_points):
    random, nodes, weights = np.random.default_rng(0), [], []
    for number, columns in enumerate((32, 8, 24)):
        shapes = {
            "B": ((columns, K // BLOCK, BLOCK // 2), np.uint8),
            "scales": ((columns, K // BLOCK), np.float32),
            "zero": ((columns, (K // BLOCK + 1) // 2), np.uint8),
        }
        for name, (shape, dtype) in shapes.items():
            array = random.integers(0, 256, shape).astype(dtype) if dtype is np.uint8 else random.random(shape, dtype)
            weights.append(
                numpy_helper.from_array(array.reshape(-1) if flat and name != "B" else array, f"{name}{number}")
            )
        inputs = ["x", *(f"{name}{number}" for name in ("B", "scales", *(["zero"] if zero_points else [])))]
        nodes.append(
            helper.make_node(
                "MatMulNBits", inputs, [f"p{number}"], domain="com.microsoft", K=K, N=columns, bits=4, block_size=BLOCK
            )
        )
        nodes.append(helper.make_node("Relu", [f"p{number}"], [f"y{number}"]))
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ["b", "n", K])],
        [helper.make_tensor_value_info(f"y{number}", FLOAT, ["b", "n", None]) for number in range(3)],
        [one for one in weights if one.name in read],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    packed = after(model, PackProjections())
    assert operators(packed).count("MatMulNBits") == 1
    feeds = {"x": random.random((2, 3, K), np.float32)}
    before, found = in_onnxruntime(model)(feeds), in_onnxruntime(packed)(feeds)
    assert all(np.allclose(before[name], found[name], rtol=1e-5) for name in before)
