"""Computed tensors have the expected elements, and stored tensors are read only when these are."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from kvsurgeon.weights import ComputedTensor, TensorSlice, computed_tensor


def stored(tmp_path, array, offset=0, dtype=None):
    path = tmp_path / "w.data"
    tensor = ir.Tensor(array, dtype=dtype)
    path.write_bytes(b"\0" * offset + tensor.tobytes())
    return ir.ExternalTensor(
        "w.data", offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name="w", base_dir=tmp_path
    )


def written(tensor):
    file = io.BytesIO()
    tensor.tofile(file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8", "float64"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_a_slice_of_a_stored_tensor_is_bitwise_equal(tmp_path, monkeypatch, dtype, axis, chunk):
    monkeypatch.setattr(computed_tensor, "CHUNK", chunk)
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = (np.random.default_rng(1).standard_normal((3, 4, 5)) * 20).astype(dtype)
    places = np.array([2, 0, 0, 1])

    tensor = ComputedTensor([[TensorSlice(tensor=stored(tmp_path, array, 24), indices=places)]], axis=axis, name="n")

    expected = np.take(array, places, axis=axis)
    assert tensor.dtype == ir.Tensor(array).dtype
    assert (tensor.name, tuple(tensor.shape.numpy()), tensor.nbytes) == ("n", expected.shape, expected.nbytes)
    assert tensor.numpy().tobytes() == tensor.tobytes() == written(tensor) == expected.tobytes()
    assert np.array_equal(np.asarray(tensor), expected)


def test_elements_of_four_bits_are_packed(tmp_path):
    array = np.arange(-8, 7).reshape(3, 5).astype(ml_dtypes.int4)
    tensor = ComputedTensor(
        [[TensorSlice(tensor=stored(tmp_path, array, dtype=ir.DataType.INT4), indices=np.array([4, 4, 1]))]],
        axis=1,
        name="n",
    )

    assert tensor.nbytes == 5  # nine elements
    assert written(tensor) == ir.Tensor(array[:, [4, 4, 1]], dtype=ir.DataType.INT4).tobytes()


def test_a_view_can_have_other_axes_than_the_stored_shape(tmp_path):
    flat = np.arange(12, dtype=np.uint8)
    parts = [TensorSlice(tensor=stored(tmp_path, flat), indices=np.array([3, 3, 0]))]

    tensor = ComputedTensor([parts], axis=0, name="n", view=(4, 3), shape=(9,))

    assert tensor.numpy().tolist() == [9, 10, 11, 9, 10, 11, 0, 1, 2]


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_slices_of_a_block_are_averaged_by_weight(tmp_path, monkeypatch, dtype, chunk):
    monkeypatch.setattr(computed_tensor, "CHUNK", chunk)
    random = np.random.default_rng(2)
    first, second = (random.standard_normal((4, 6)).astype(dtype) for _ in range(2))
    parts = [
        TensorSlice(tensor=ir.Tensor(first), indices=np.array([0, 5])),
        TensorSlice(tensor=ir.Tensor(second), indices=np.array([1, 1]), weight=3),
    ]

    tensor = ComputedTensor([parts], axis=1, name="n")

    expected = (first[:, [0, 5]].astype(np.float64) + 3 * second[:, [1, 1]].astype(np.float64)) / 4
    assert np.array_equal(tensor.numpy(), expected.astype(dtype))


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_are_concatenated(monkeypatch, axis, chunk):
    monkeypatch.setattr(computed_tensor, "CHUNK", chunk)
    array = np.random.default_rng(4).standard_normal((6, 6)).astype(np.float32)
    kept = TensorSlice(tensor=ir.Tensor(array), indices=np.arange(4))
    merged = [TensorSlice(tensor=ir.Tensor(array), indices=np.array([place])) for place in (4, 5)]

    tensor = ComputedTensor([[kept], merged], axis=axis, name="n")

    parts = [np.take(array, range(4), axis), np.take(array, [4, 5], axis).mean(axis, keepdims=True)]
    assert np.array_equal(tensor.numpy(), np.concatenate(parts, axis))


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_mean_of_equal_slices_is_bitwise_equal(dtype, count):
    array = np.random.default_rng(3).standard_normal((5, 3)).astype(dtype)
    tensor = ComputedTensor([[TensorSlice(tensor=ir.Tensor(array), indices=np.arange(3))] * count], axis=1, name="n")

    assert tensor.numpy().tobytes() == array.tobytes()


def test_computed_tensors_can_be_sliced(tmp_path):
    source = stored(tmp_path, np.arange(6, dtype=np.float32).reshape(2, 3))
    inner = ComputedTensor([[TensorSlice(tensor=source, indices=np.array([2, 1]))]], axis=1, name="inner")
    outer = ComputedTensor([[TensorSlice(tensor=inner, indices=np.array([1, 1]))]], axis=0, name="outer")

    assert outer.numpy().tolist() == [[5, 4], [5, 4]]


def test_repr_reads_nothing(tmp_path):
    source = ir.ExternalTensor("not there", 0, 24, ir.DataType.FLOAT, shape=ir.Shape([2, 3]), name="w", base_dir="/")

    tensor = ComputedTensor([[TensorSlice(tensor=source, indices=np.array([0, 0]))]], axis=0, name="n")

    assert (tensor.nbytes, tensor.size, "[2,3]" in repr(tensor)) == (24, 6, True)
    with pytest.raises(OSError, match="not there"):
        tensor.numpy()


def test_a_shape_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="expected a shape of 6 elements"):
        ComputedTensor(
            [[TensorSlice(tensor=ir.Tensor(np.zeros((2, 3))), indices=np.arange(2))]], axis=0, name="n", shape=(5,)
        )


def test_a_proto_has_its_elements():
    tensor = ComputedTensor([[TensorSlice(tensor=ir.Tensor(np.eye(2)), indices=np.array([1]))]], axis=0, name="n")

    assert ir.from_proto(ir.to_proto(tensor)).numpy().tolist() == [[0, 1]]
