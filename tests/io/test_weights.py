"""External data is looked up and never read; what is not whole inside the model's folder is refused."""

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
    """Let the weight `w` of the model refer to other data than it does."""
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
    os.mkfifo(data)  # whoever opens it to read waits for ever; and it is no regular file
    refused(external, "found no such file")


@pytest.mark.parametrize("location", ["../outside.data", "sub/../../outside.data", "..\\outside.data"])
def test_a_location_that_climbs(external: Path, location: str) -> None:
    shutil.copy(external.with_name("model.data"), external.parent.parent / "outside.data")
    refer(external, location=location)
    refused(external, "expected external data inside the model's folder, found location .* - at `w`")


@pytest.mark.parametrize("location", ["C:\\weights.data", "\\\\server\\weights.data"])
def test_a_location_that_is_absolute_elsewhere(external: Path, location: str) -> None:
    refer(external, location=location)
    refused(external, "inside the model's folder, found location .* - at `w`")


def test_a_location_that_is_absolute(external: Path) -> None:
    refer(external, location=str(external.with_name("model.data")))
    refused(external, "inside the model's folder, found location `/.* - at `w`")


def test_a_link_that_leads_outside(external: Path) -> None:
    data = external.with_name("model.data")
    outside = external.parent.parent / "outside.data"
    data.rename(outside)
    data.symlink_to(outside)
    refused(external, "found a link from `model.data` to .*outside.data` - at `w`")


def test_a_folder_that_leads_outside(external: Path) -> None:
    outside = external.parent.parent / "outside"
    outside.mkdir()
    external.with_name("model.data").rename(outside / "model.data")
    external.with_name("sub").symlink_to(outside)
    refer(external, location="sub/model.data")
    refused(external, "found a link from `sub/model.data`")


def test_a_link_that_stays_inside(external: Path) -> None:
    data = external.with_name("model.data")
    data.rename(external.with_name("real.data"))
    data.symlink_to("real.data")
    assert weight_files(load(external))[0].bytes == 80


def test_the_cache_of_a_hub_where_model_and_data_are_links_into_one_folder(external: Path) -> None:
    blobs = external.parent.rename(external.parent.with_name("blobs"))
    snapshot = blobs.with_name("snapshot")
    snapshot.mkdir()
    for name in ("model.onnx", "model.data"):
        (snapshot / name).symlink_to(blobs / name)
    tensor = load(snapshot).graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy()[0, 1] == 1.0


def test_a_data_file_that_is_missing(external: Path) -> None:
    external.with_name("model.data").unlink()
    refused(external, "expected external data in the file .* found no such file - at `w`")


def test_a_data_file_that_is_too_short(external: Path) -> None:
    os.truncate(external.with_name("model.data"), 79)
    refused(external, "expected at least 80 bytes in `model.data`, found 79 - at `w`")


@pytest.mark.parametrize("length", ["63", "65", "0"])
def test_a_length_that_is_not_that_of_the_tensor(external: Path, length: str) -> None:
    refer(external, length=length)
    refused(external, rf"expected 64 bytes .* found a length of {length} - at `w`")


@pytest.mark.parametrize(("key", "value"), [("offset", "-16"), ("length", "-64"), ("offset", "much"), ("offset", "²")])
def test_an_extent_that_is_no_number(external: Path, key: str, value: str) -> None:
    refer(external, **{key: value})
    refused(external, f"expected bytes as {key} of external data, found '{value}' - at `w`")


def test_a_reference_to_no_file(external: Path) -> None:
    refer(external, location="")
    refused(external, "does not say in which file it lies - at `w`")


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


def test_a_key_that_onnx_does_not_know_is_no_cause_for_a_warning(external: Path) -> None:
    refer(external, flavour="vanilla")
    load(external)


@pytest.mark.parametrize("several", [False, True])
def test_tensors_that_a_node_carries_are_checked_too(external: Path, several: bool) -> None:
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
    refused(external, "inside the model's folder")


def test_a_proto_brings_its_weights_only_with_a_folder(external: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    os.truncate(external.with_name("model.data"), 0)
    load(proto)
    with pytest.raises(WeightsError, match="found 0 - at `w`"):
        load(proto, folder=external.parent)
