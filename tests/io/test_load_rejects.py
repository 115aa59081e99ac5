"""Files that are not models and invalid graphs are rejected, each with a message in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest

from kvsurgeon.errors import InputError, InvalidModelError
from kvsurgeon.io import load, locate, to_proto


def refused(source: Path | onnx.ModelProto, match: str) -> None:
    with pytest.raises(InvalidModelError, match=match) as caught:
        load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<html>\n  not found\n</html>\n", "is a text file"),
        (b"\xff\xfe\x00\x81garbage", "is not an ONNX model"),
        (b"\x08\x09", "expected a model with a graph, found none"),
    ],
)
def test_other_files_are_rejected(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, match)


@pytest.mark.parametrize("part", [0.2, 0.6, 0.99])
def test_a_truncated_file_is_rejected(tmp_path: Path, proto: onnx.ModelProto, part: float) -> None:
    whole = proto.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: int(part * len(whole))])
    refused(path, "truncated|found no")


def test_a_message_names_the_file(tmp_path: Path, proto: onnx.ModelProto) -> None:
    proto.ir_version = 99
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path, r"model\.onnx`: expected an ir_version")


def test_a_file_larger_than_a_protobuf_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(locate.PROTOBUF_LIMIT + 1)  # a hole: no room is taken
    refused(path, "more than the 2 GiB")


def test_an_unreadable_file_is_reported(
    proto: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"cannot read `.*`: Permission denied"):
        load(path)


def no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


def future_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def no_ir_version(model: onnx.ModelProto) -> None:
    model.ClearField("ir_version")


def no_graph(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


def no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def dangling_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "absent"


def dangling_input_of_a_subgraph(model: onnx.ModelProto) -> None:
    branch = onnx.parser.parse_graph("then () => (float[n, 4] t) { t = Identity (absent) }")
    node = onnx.helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)


def dangling_input_of_a_function(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("Neg", ["absent"], ["c"])
    opsets = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("own", "F", ["a"], ["c"], [node], opsets))


def output_of_nobody(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "absent"


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def cycle_through_a_subgraph(model: onnx.ModelProto) -> None:
    branch = onnx.parser.parse_graph("then () => (float[n, 4] t) { t = Identity (z) }")
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch))


def name_made_twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "h"


def input_twice(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def short_raw_data(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = bytes(60)


def short_typed_data(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0] * 15)


def no_data(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")


def negative_dims(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-4, 4]


def negative_dims_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-4, -4]


def absurd_dims(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**40, 2**40]


def huge_dims(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**20, 2**20]


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def undefined_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 0


def short_constant(model: onnx.ModelProto) -> None:
    value = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [2], bytes(8), raw=True)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value=value))
    model.graph.node[-1].attribute[0].t.raw_data = bytes(7)


def attribute_without_type(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.add(name="axis", i=1)


def sparse_constant(model: onnx.ModelProto) -> None:
    values = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [1.0])
    indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
    sparse = onnx.helper.make_sparse_tensor(values, indices, [4])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], sparse_value=sparse))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (no_opset, "found no opset_import"),
        (future_opset, "expected an opset from 1 to .*, found 99"),
        (no_ir_version, "expected an ir_version from 1 to .*, found 0"),
        (no_graph, "expected a model with a graph"),
        (no_outputs, "expected a graph with outputs"),
        (dangling_input, "named `absent`, found none, but MatMul `h` reads it"),
        (dangling_input_of_a_subgraph, "named `absent`, found none, but Identity `t` reads it"),
        (dangling_input_of_a_function, "named `absent`, found none, but Neg `c` reads it"),
        (output_of_nobody, "named `absent`, found none, but the list of graph outputs reads it"),
        (cycle, "a value that depends on itself: `(y|h)` -> `(y|h)`"),
        (cycle_through_a_subgraph, "a value that depends on itself: `z` -> `z`"),
        (name_made_twice, "Add `h` computes `h`: expected a new name"),
        (input_twice, "inputs of different names, found x, x"),
        (short_raw_data, r"expected 64 bytes for FLOAT\[4, 4\], found 60 - at `w`"),
        (short_typed_data, "expected 16 entries in float_data .* found 15 - at `w`"),
        (no_data, "expected 16 entries in float_data .* found 0 - at `w`"),
        (negative_dims, r"expected dims of a tensor, found \[-4, 4\] - at `w`"),
        (negative_dims_twice, r"expected dims of a tensor, found \[-4, -4\] - at `w`"),
        (absurd_dims, "expected dims of a tensor, found .* - at `w`"),
        (huge_dims, "expected 4398046511104 bytes .* found 64 - at `w`"),
        (unknown_type, "expected an element type of ONNX, found number 99 - at `w`"),
        (undefined_type, "expected an element type of ONNX, found number 0 - at `w`"),
        (short_constant, "expected 8 bytes .* found 7 - at Constant `c`"),
        (attribute_without_type, "expected an attribute with a type, found `axis` - at MatMul `h`"),
        (sparse_constant, "cannot represent this model: Sparse tensors are not supported"),
    ],
)
def test_invalid_graphs_are_rejected(
    proto: onnx.ModelProto, damage: Callable[[onnx.ModelProto], None], match: str
) -> None:
    load(proto)  # whole, it loads
    damage(proto)
    refused(proto, match)


def test_a_message_is_one_line_for_any_names(tmp_path: Path, proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "ab\n\x1b[31mé"
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(path, r"named `ab\\n\\x1b\[31mé`")


def test_names_that_are_not_utf_8_are_rejected(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(onnx.helper.make_node("Neg", ["x"], ["mark"]))
    damaged = proto.SerializeToString().replace(b"mark", b"\xff\xfe\xfd\xfc")
    refused(onnx.ModelProto.FromString(damaged), "expected names in UTF-8, found b'")


def test_other_text_that_is_not_utf_8_is_reported_on_writing(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].metadata_props.add(key="mark", value="mark")
    damaged = proto.SerializeToString().replace(b"mark", b"\xff\xfe\xfd\xfc")
    model = load(onnx.ModelProto.FromString(damaged))
    with pytest.raises(InvalidModelError, match=r"cannot write this model: .*utf-8"):
        to_proto(model)
