"""External data is checked without being read; data that is not complete in the folder of the model is rejected."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from kvsurgeon.errors import InputError, InvalidModelError, WeightsError
from kvsurgeon.io import check_weights, load, weight_files


def refer(path: Path, **entries: str) -> None:
    """Change the reference to external data of the weight `w`."""
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def refused(path: Path, match: str, error: type[InputError] = WeightsError) -> None:
    with pytest.raises(error, match=match) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_weights_are_found_and_can_be_read(external: Path) -> None:
    model = load(external)
    (file,) = weight_files(model)
    assert (file.path, file.location, file.bytes) == (external.with_name("model.data"), "model.data", 80)
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.arange(16, dtype=np.float32).reshape(4, 4))


def test_loading_does_not_open_the_data_file(external: Path) -> None:
    data = external.with_name("model.data")
    data.unlink()
    os.mkfifo(data)  # reading from it would block, and it is not a regular file
    refused(external, "found no such file")


@pytest.mark.parametrize("location", ["../outside.data", "sub/../../outside.data", "..\\outside.data"])
def test_a_location_outside_the_folder_is_rejected(external: Path, location: str) -> None:
    shutil.copy(external.with_name("model.data"), external.parent.parent / "outside.data")
    refer(external, location=location)
    refused(external, "expected external data in the folder of the model, found location .* - at `w`")


@pytest.mark.parametrize("location", ["C:\\weights.data", "\\\\server\\weights.data"])
def test_an_absolute_location_of_another_system_is_rejected(external: Path, location: str) -> None:
    refer(external, location=location)
    refused(external, "in the folder of the model, found location .* - at `w`")


def test_an_absolute_location_is_rejected(external: Path) -> None:
    refer(external, location=str(external.with_name("model.data")))
    refused(external, "in the folder of the model, found location `/.* - at `w`")


def test_a_link_out_of_the_folder_is_rejected(external: Path) -> None:
    data = external.with_name("model.data")
    outside = external.parent.parent / "outside.data"
    data.rename(outside)
    data.symlink_to(outside)
    refused(external, "found a link from `model.data` to .*outside.data` - at `w`")


def test_a_linked_folder_is_rejected(external: Path) -> None:
    outside = external.parent.parent / "outside"
    outside.mkdir()
    external.with_name("model.data").rename(outside / "model.data")
    external.with_name("sub").symlink_to(outside)
    refer(external, location="sub/model.data")
    refused(external, "found a link from `sub/model.data`")


def test_a_link_inside_the_folder_is_accepted(external: Path) -> None:
    data = external.with_name("model.data")
    data.rename(external.with_name("real.data"))
    data.symlink_to("real.data")
    assert weight_files(load(external))[0].bytes == 80


def test_the_symlinks_of_the_hugging_face_cache_are_accepted(external: Path) -> None:
    blobs = external.parent.rename(external.parent.with_name("blobs"))
    snapshot = blobs.with_name("snapshot")
    snapshot.mkdir()
    for name in ("model.onnx", "model.data"):
        (snapshot / name).symlink_to(blobs / name)
    tensor = load(snapshot).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy()[0, 1] == 1.0


def test_a_missing_data_file_is_reported(external: Path) -> None:
    external.with_name("model.data").unlink()
    refused(external, "expected external data in the file .* found no such file - at `w`")


def test_a_truncated_data_file_is_reported(external: Path) -> None:
    os.truncate(external.with_name("model.data"), 79)
    refused(external, "expected at least 80 bytes in `model.data`, found 79 - at `w`")


@pytest.mark.parametrize("length", ["63", "65", "0"])
def test_a_wrong_length_is_rejected(external: Path, length: str) -> None:
    refer(external, length=length)
    refused(external, rf"expected 64 bytes .* found a length of {length} - at `w`")


@pytest.mark.parametrize(("key", "value"), [("offset", "-16"), ("length", "-64"), ("offset", "much"), ("offset", "²")])
def test_an_extent_that_is_not_a_number_is_rejected(external: Path, key: str, value: str) -> None:
    refer(external, **{key: value})
    refused(external, f"expected a number of bytes as {key} of external data, found '{value}' - at `w`")


def test_a_reference_without_location_is_rejected(external: Path) -> None:
    refer(external, location="")
    refused(external, "external data has no location - at `w`")


def test_strings_cannot_be_external(external: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    proto.graph.initializer[0].data_type = onnx.TensorProto.STRING
    external.write_bytes(proto.SerializeToString())
    refused(external, "strings cannot be external data - at `w`", InvalidModelError)


@pytest.mark.parametrize(("elements", "length"), [(15, 8), (16, 8), (17, 9)])
def test_two_elements_of_four_bits_share_a_byte(external: Path, elements: int, length: int) -> None:
    proto = onnx.load(external, load_external_data=False)
    tensor = proto.graph.initializer[0]
    tensor.data_type = onnx.TensorProto.UINT4
    tensor.dims[:] = [elements]
    external.write_bytes(proto.SerializeToString())
    refer(external, length=str(length))
    load(external)
    refer(external, length=str(elements))
    refused(external, f"expected {length} bytes")


def test_a_reference_without_extent_means_the_whole_file(external: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    del proto.graph.initializer[0].external_data[1:]
    external.write_bytes(proto.SerializeToString())
    check_weights(load(external))


def test_an_unknown_key_gives_no_warning(external: Path) -> None:
    refer(external, flavour="vanilla")
    load(external)


@pytest.mark.parametrize("several", [False, True])
def test_tensors_of_nodes_are_checked_too(external: Path, several: bool) -> None:
    proto = onnx.load(external, load_external_data=False)
    tensor = onnx.TensorProto.FromString(proto.graph.initializer[0].SerializeToString())
    del proto.graph.initializer[0]
    proto.graph.node[0].input[1] = "c"
    value = [tensor] if several else tensor
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=value))
    external.write_bytes(proto.SerializeToString())
    assert len(weight_files(load(external))) == 1
    attribute = proto.graph.node[0].attribute[0]
    (attribute.tensors[0] if several else attribute.t).external_data[0].value = "../absent.data"
    external.write_bytes(proto.SerializeToString())
    refused(external, "in the folder of the model")


def test_weights_of_a_proto_are_checked_only_with_a_folder(external: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    os.truncate(external.with_name("model.data"), 0)
    load(proto)
    with pytest.raises(WeightsError, match="found 0 - at `w`"):
        load(proto, folder=external.parent)
