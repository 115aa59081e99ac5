"""Execute nodes of a graph in onnxruntime: build a model of them, open a session, run it.

This is the only place outside `runtime/` that opens a session. Nothing is optimized, so that every operator runs as it
is written, and one thread computes, so that results repeat.

    model = build_model(nodes, inputs={"x": (ir.DataType.FLOAT, 2)}, outputs=["y"], opsets=graph.opset_imports)
    (y,) = open_session(model).run(None, {"x": x})
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

IR_VERSION = 10  # which every supported onnxruntime reads

InputType = tuple[int | ir.DataType, int]  # element type and rank


def build_model(
    nodes: Iterable[ir.Node | onnx.NodeProto],
    *,
    outputs: Iterable[str | None],
    opsets: Mapping[str, int],
    inputs: Mapping[str, InputType] | None = None,
    initializers: Iterable[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Return a model that computes some values.

    An input may have the name of a value that a node computes: the value that is fed replaces the computed one.

    Args:
        nodes: The nodes, in execution order.
        outputs: Names of the values to compute.
        opsets: Version by operator domain.
        inputs: Element type and rank of each value that is fed, by name.
        initializers: Constants; see `initializer`.
    """
    inputs = inputs or {}
    graph = onnx.GraphProto(name="subgraph")
    for node in nodes:
        proto = ir.serde.serialize_node(node) if isinstance(node, ir.Node) else node
        if any(name in inputs for name in proto.output):
            proto.output[:] = [f"{name}.computed" if name in inputs else name for name in proto.output]
        graph.node.append(proto)
    graph.initializer.extend(initializers)
    for name, (dtype, rank) in inputs.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, int(dtype), [None] * rank))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


def use_float32(node: onnx.NodeProto, narrow: Collection[int]) -> None:
    """Replace narrower types by float32 in the attributes of a node: names of types, and tensors."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in narrow:
            attribute.i = onnx.TensorProto.FLOAT
        if attribute.HasField("t") and attribute.t.data_type in narrow:
            array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))


def initializer(name: str | None, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """Return a constant for `build_model`, with its content read and under another name."""
    return ir.serde.serialize_tensor(ir.Tensor(np.asarray(tensor.numpy()), dtype=tensor.dtype, name=name))


def open_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Open a session that runs a model unoptimized, on one thread, and logs nothing.

    Raises whatever onnxruntime raises for a model that it cannot run.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
