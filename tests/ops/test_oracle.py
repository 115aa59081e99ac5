"""Inferred shapes are those that onnxruntime computes: of every intermediate value, at two lengths."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import Config, Decoder
from exports import NAMES, export, injected, injected_export, with_all_outputs
from laws import dims_of, in_chunks, in_onnxruntime, texts
from onnx import helper

from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.dataflow.shape_inference import infer_shapes
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH

SIZES = [(1, 5), (3, 8)]


@pytest.mark.parametrize("name", NAMES)
def test_claims_are_what_onnxruntime_finds(name):
    model = export(name)
    graph = ir.from_proto(model).graph
    dimensions = read_inputs(graph).dimensions
    shapes = infer_shapes(list(graph), dimensions, graph.opset_imports[""])
    values = {value.name: value for node in graph for value in node.outputs}
    run = in_onnxruntime(with_all_outputs(model))
    for batch, length in SIZES:
        for name, found in run(texts(model, batch, length)).items():
            fact = shapes[values[name]]
            assert fact.shape is not None, name
            at = ((BATCH, batch), (LENGTH, length))
            assert tuple(dim.substitute(size, at) for size in fact.shape) == found.shape, name
            assert fact.dtype is None or fact.dtype.numpy() == found.dtype, name
            if fact.value is not None:
                claimed = [float(dim.substitute(number, at)) if hasattr(number, "subs") else number
                           for number in fact.value.reshape(-1)]  # fmt: skip
                np.testing.assert_allclose(found.reshape(-1), claimed, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_after_injection_what_is_declared_is_what_onnxruntime_finds(name):
    assert_declares_what_runs(export(name), injected_export(name), SIZES)


@pytest.mark.parametrize("options", [{}, {"attention_mask": False}, {"position_ids": True}], ids=str)
def test_after_injection_of_a_static_export_too(options):
    model = onnx.shape_inference.infer_shapes(Decoder(Config(layers=2, static=(2, 9), **options)).model())
    assert_declares_what_runs(model, injected(model), [(2, 9)])


def assert_declares_what_runs(model, injected, pairs):
    declared = {value.name: value for value in (*injected.graph.value_info, *injected.graph.output)}
    assert declared

    wide = with_all_outputs(injected)
    run, cuts = in_onnxruntime(wide), (3, 4)
    for batch, length in pairs:
        steps = in_chunks(wide, run, texts(model, batch, length), cuts)
        for past, stop, found in zip((0, *cuts), (*cuts, length), steps, strict=True):
            sizes = {"batch_size": batch, "past_sequence_length": past, "sequence_length": stop - past,
                     "total_sequence_length": stop}  # fmt: skip
            for name in found.keys() & declared.keys():
                tensor = declared[name].type.tensor_type
                assert helper.np_dtype_to_tensor_dtype(found[name].dtype) == tensor.elem_type, name
                if tensor.HasField("shape"):
                    assert_declared(name, dims_of(declared[name]), found[name].shape, sizes)


def assert_declared(name, dims, shape, sizes):
    assert len(dims) == len(shape), name
    for size, real in zip(dims, shape, strict=True):
        claimed = sizes.get(size, size)
        assert claimed == real or not isinstance(claimed, int), (name, dims, shape, sizes)
