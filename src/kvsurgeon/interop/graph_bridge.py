"""Convert a model to onnx-graphsurgeon and back without loss.

onnx-graphsurgeon 0.6 drops the metadata of nodes and models, the folder of external data, and unused initializers. So
it gets a copy of the graph with placeholders for weights. On the way back, everything unchanged is replaced by the
original, byte for byte, and what was changed keeps the original metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.logger import G_LOGGER

from kvsurgeon.interop.lazy_weights import WeightTable
from kvsurgeon.interop.node_order import in_original_order, is_sorted, names_read
from kvsurgeon.passes.weightless import weightless_proto

Proto = TypeVar("Proto", onnx.NodeProto, onnx.ValueInfoProto, onnx.FunctionProto)
VALUE_TYPES = ("tensor_type", "sequence_type", "sparse_tensor_type")  # the types that onnx-graphsurgeon can write


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An imported object before the function runs.

    Attributes:
        imported: The object of onnx-graphsurgeon, kept alive so that its id stays unique.
        original: Its proto in the model.
        exported: The proto that onnx-graphsurgeon writes for it; None for a graph.
        index: Position of a node in its graph.
        values: Snapshots of the tensors of a graph, by name.
    """

    imported: Any
    original: Any
    exported: Any = None
    index: int = 0
    values: Mapping[str, Snapshot] = field(default_factory=dict)


class GraphBridge:
    """A model as a `gs.Graph`, and the conversion back.

    Attributes:
        graph: The graph, which a function may edit.
    """

    def __init__(self, model: ir.Model) -> None:
        self._weights = WeightTable()
        self._original = weightless_proto(model, self._weights.placeholder)
        self._graphs: dict[int, Snapshot] = {}  # by id
        self._subgraphs: dict[tuple[str, ...], Snapshot] = {}  # by attribute and signature of the node
        self._nodes: dict[int | tuple[str, ...], Snapshot] = {}  # by id and by signature
        copy = onnx.ModelProto()  # onnx-graphsurgeon changes the proto that it imports
        copy.CopyFrom(self._original)
        with G_LOGGER.suppress():
            self.graph: gs.Graph = gs.import_onnx(copy)
            self._opset = self.graph.opset
            for constant in _constants(self.graph):
                self._weights.bind(constant)
            self._record_graph(self.graph, self._original.graph)
            self._functions = {
                id(function): Snapshot(
                    imported=function, original=original, exported=OnnxExporter.export_function(function)
                )
                for function, original in zip(self.graph.functions, self._original.functions, strict=True)
            }

    def to_model(self, graph: gs.Graph, folder: Path | None) -> ir.Model | None:
        """Return the model of a graph, or None if it is unchanged.

        Args:
            graph: The edited graph, or another one.
            folder: The folder of external data.
        """
        with G_LOGGER.suppress():
            proto = self._export(graph)
        if _equal(proto, self._original):
            return None
        model = ir.from_proto(proto)
        if folder is not None:
            ir.external_data.set_base_dir(model.graph, folder)  # of tensors in attributes
        self._weights.restore(model.graph)
        if not is_sorted(proto.graph.node):
            model.graph.sort()
        return model

    # Import: record each object, and how onnx-graphsurgeon exports it unchanged.

    def _record_graph(self, graph: gs.Graph, original: onnx.GraphProto) -> None:
        infos = {info.name: info for info in (*original.value_info, *original.input, *original.output)}
        values = {
            tensor.name: Snapshot(imported=tensor, original=infos[tensor.name], exported=_value_info(tensor))
            for tensor in graph.tensors().values()
            if tensor.name in infos
        }
        self._graphs[id(graph)] = Snapshot(imported=graph, original=original, values=values)
        for index, (node, proto) in enumerate(zip(graph.nodes, original.node, strict=True)):
            attributes = {attribute.name: attribute for attribute in proto.attribute}
            for name, subgraph in _subgraphs(node):
                self._record_graph(subgraph, attributes[name].g)
                self._subgraphs[(name, *_signature(node))] = self._graphs[id(subgraph)]
            snapshot = Snapshot(imported=node, original=proto, exported=self._export_node(node), index=index)
            self._nodes[id(node)] = self._nodes[_signature(node)] = snapshot

    # Export: replace unchanged objects by their originals.

    def _export(self, graph: gs.Graph) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._original)
        for name in ("producer_name", "producer_version", "ir_version"):
            if (getattr(graph, name) or getattr(proto, name)) != getattr(proto, name):
                setattr(proto, name, getattr(graph, name))
        functions = [
            _restored(OnnxExporter.export_function(function), self._functions.get(id(function)))
            for function in graph.functions
        ]
        del proto.functions[:]
        proto.functions.extend(functions)
        proto.graph.CopyFrom(self._export_main_graph(graph))
        self._set_opsets(proto, graph)
        return proto

    def _set_opsets(self, proto: onnx.ModelProto, graph: gs.Graph) -> None:
        versions = {opset.domain: opset.version for opset in graph.import_domains or ()}
        if graph.opset != self._opset:
            versions["ai.onnx" if "ai.onnx" in versions else ""] = graph.opset
        for node in _nodes(graph):
            versions.setdefault(node.domain or "", 1)
        if versions != {opset.domain: opset.version for opset in proto.opset_import}:
            del proto.opset_import[:]
            proto.opset_import.extend(onnx.helper.make_opsetid(*opset) for opset in sorted(versions.items()))

    def _export_main_graph(self, graph: gs.Graph) -> onnx.GraphProto:
        before = self._graphs.get(id(graph), self._graphs[id(self.graph)])
        subgraphs = (one.original for one in self._graphs.values() if one is not before)
        of_subgraphs = {tensor.name for original in subgraphs for tensor in original.initializer}
        constants = {c.name: c for c in _constants(graph) if c.name not in of_subgraphs}
        exported = [self._weights.export(constant) for constant in constants.values()]
        unused = _unused_initializers(before.original)
        exported += [
            (index, tensor)
            for index, tensor in enumerate(before.original.initializer)
            if tensor.name in unused and tensor.name not in constants
        ]
        exported.sort(key=lambda pair: pair[0])
        return self._export_graph(graph, before, [tensor for _, tensor in exported])

    def _export_subgraph(self, graph: gs.Graph, key: tuple[str, ...]) -> onnx.GraphProto:
        before = self._graphs.get(id(graph)) or self._subgraphs.get(key)
        if before is None:
            return self._export_graph(graph, Snapshot(imported=graph, original=onnx.GraphProto()), [])
        own = {tensor.name: tensor for tensor in before.original.initializer}
        unused = _unused_initializers(before.original)
        initializers = {name: tensor for name, tensor in own.items() if name in unused}
        initializers |= {c.name: OnnxExporter.export_tensor_proto(c) for c in _constants(graph) if c.name in own}
        return self._export_graph(graph, before, [initializers[name] for name in own if name in initializers])

    def _export_graph(self, graph: gs.Graph, before: Snapshot, initializers: list[onnx.TensorProto]) -> onnx.GraphProto:
        original = before.original
        proto = onnx.GraphProto(name=graph.name or None, doc_string=graph.doc_string or None, initializer=initializers)
        proto.node.extend(self._export_nodes(graph))
        names = {tensor.name for tensor in initializers}
        defaults = [info for info in original.input if info.name in names]  # initializers that are inputs too
        proto.input.extend([*(_restored_info(tensor, before) for tensor in graph.inputs), *defaults])
        proto.output.extend(_restored_info(tensor, before) for tensor in graph.outputs)
        interface = {info.name for info in (*proto.input, *proto.output)}
        proto.value_info.extend(info for info in original.value_info if info.name in names)
        computed = [value for node in graph.nodes for value in node.outputs if value.name not in ("", *interface)]
        infos = (_restored_info(tensor, before) for tensor in computed)
        proto.value_info.extend(info for info in infos if info.HasField("type") or info.metadata_props)
        names |= interface | {tensor.name for tensor in computed}
        proto.quantization_annotation.extend(
            annotation for annotation in original.quantization_annotation if annotation.tensor_name in names
        )
        proto.metadata_props.extend(original.metadata_props)
        return proto

    def _export_nodes(self, graph: gs.Graph) -> list[onnx.NodeProto]:
        protos, origins = [], []
        for node in graph.nodes:
            exported = self._export_node(node)
            before = self._nodes.get(id(node)) or self._nodes.get(_signature(node))
            protos.append(exported if before is None else _restored_node(exported, before))
            origins.append(None if before is None else before.index)
        return in_original_order(protos, origins)

    def _export_node(self, node: gs.Node) -> onnx.NodeProto:
        """Return a node as onnx-graphsurgeon exports it, with restored subgraphs."""
        subgraphs = dict(_subgraphs(node))
        proto = onnx.NodeProto(op_type=node.op, name=node.name or None, domain=node.domain)
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        for name, value in node.attrs.items():
            if name in subgraphs:
                graph = self._export_subgraph(value, (name, *_signature(node)))
                proto.attribute.add(name=name, type=onnx.AttributeProto.GRAPH, g=graph)
            else:
                proto.attribute.extend(OnnxExporter.export_attributes({name: value}))
        return proto


def _restored(exported: Proto, before: Snapshot | None) -> Proto:
    """Return the original if it is exported as before, or else the new proto with the metadata of the original."""
    if before is None:
        return exported
    original: Proto = before.original
    if _equal(exported, before.exported):
        return original
    for name in ("doc_string", "metadata_props", "overload"):
        if name in exported.DESCRIPTOR.fields_by_name and not getattr(exported, name):
            exported.MergeFrom(type(exported)(**{name: getattr(original, name)}))
    return exported


def _restored_node(exported: onnx.NodeProto, before: Snapshot) -> onnx.NodeProto:
    restored = _restored(exported, before)
    if restored is not exported:
        return restored
    exported_before = {attribute.name: attribute for attribute in before.exported.attribute}
    originals = {attribute.name: attribute for attribute in before.original.attribute}
    for attribute in restored.attribute:
        if attribute.name in exported_before and _equal(attribute, exported_before[attribute.name]):
            attribute.CopyFrom(originals[attribute.name])
    # attributes that onnx-graphsurgeon drops
    restored.attribute.extend(attribute for name, attribute in originals.items() if name not in exported_before)
    return restored


def _restored_info(tensor: gs.Tensor, graph: Snapshot) -> onnx.ValueInfoProto:
    return _restored(_value_info(tensor), graph.values.get(tensor.name))


def _value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    if isinstance(tensor, gs.Variable) and tensor.type not in VALUE_TYPES:
        return onnx.ValueInfoProto(name=tensor.name)
    info: onnx.ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, do_type_check=False)
    return info


def _unused_initializers(graph: onnx.GraphProto) -> set[str]:
    """Return the initializers that no node reads, which onnx-graphsurgeon drops."""
    read = {name for node in graph.node for name in names_read(node)}
    return {tensor.name for tensor in graph.initializer} - read


def _equal(first: Any, second: Any) -> bool:
    return bool(first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True))


def _signature(node: gs.Node) -> tuple[str, ...]:
    """Return what identifies a node in a copy of the graph."""
    return (node.domain or "", node.op, *(tensor.name for tensor in node.outputs))


def _subgraphs(node: gs.Node) -> Iterator[tuple[str, gs.Graph]]:
    return ((name, value) for name, value in node.attrs.items() if isinstance(value, gs.Graph))


def _nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Yield the nodes of a graph and of all subgraphs."""
    for node in graph.nodes:
        yield node
        for _, subgraph in _subgraphs(node):
            yield from _nodes(subgraph)


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    for node in _nodes(graph):
        yield from (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))
    yield from (tensor for tensor in graph.outputs if isinstance(tensor, gs.Constant))
