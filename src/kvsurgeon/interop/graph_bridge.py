"""A model lent to onnx-graphsurgeon, and taken back with everything that onnx-graphsurgeon cannot carry.

onnx-graphsurgeon 0.6 drops the metadata of nodes and models, forgets the folder of external weights, and loses
initializers that no node reads. So it is given a copy of the structure with stand-ins for the weights. Coming back,
whatever it left as it was is replaced by the original, to the byte; whatever it changed keeps the original's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.logger import G_LOGGER

from kvsurgeon.interop.lazy_values import Shelf
from kvsurgeon.interop.node_order import in_original_order, is_sorted
from kvsurgeon.passes.weightless import weightless_proto

Proto = TypeVar("Proto", onnx.NodeProto, onnx.ValueInfoProto, onnx.FunctionProto)
BODY_TYPES = ("tensor_type", "sequence_type", "sparse_tensor_type")  # that onnx-graphsurgeon can write


@dataclass(frozen=True)
class Lent:
    """One thing that was lent: the object, how onnx-graphsurgeon wrote it then, and how it really is."""

    lent: Any  # held so that its id() is not given to another
    before: Any
    original: Any
    place: int = 0


@dataclass(frozen=True)
class LentGraph:
    """A graph or body that was lent."""

    lent: gs.Graph
    original: onnx.GraphProto
    values: dict[str, Lent] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()  # initializers that no node reads


class Loan:
    """A model's structure as a `gs.Graph`, and how to take it back."""

    def __init__(self, model: ir.Model) -> None:
        self._shelf = Shelf()
        self._original = weightless_proto(model, self._shelf.stand_in)
        self._nodes: dict[int, Lent] = {}
        self._nodes_by_output: dict[tuple[str, ...], Lent] = {}
        self._graphs: dict[int, LentGraph] = {}
        self._bodies: dict[tuple[str, ...], LentGraph] = {}
        copy = onnx.ModelProto()  # onnx-graphsurgeon writes into what it imports
        copy.CopyFrom(self._original)
        with G_LOGGER.suppress():
            self.graph: gs.Graph = gs.import_onnx(copy)
            self._opset = self.graph.opset
            for constant in _constants(self.graph):
                self._shelf.lend(constant)
            self._lend_graph(self.graph, self._original.graph)
            self._functions = [
                Lent(lent, OnnxExporter.export_function(lent), original)
                for lent, original in zip(self.graph.functions, self._original.functions, strict=True)
            ]

    def take_back(self, graph: gs.Graph, folder: Path | None) -> ir.Model | None:
        """Return the model that `graph` is now, or None if it is as it was."""
        with G_LOGGER.suppress():
            proto = self._model(graph)
        if proto.SerializeToString(deterministic=True) == self._original.SerializeToString(deterministic=True):
            return None
        model = ir.from_proto(proto)
        if folder is not None:
            ir.external_data.set_base_dir(model.graph, folder)  # tensors in attributes; the others are held
        self._shelf.attach(model.graph)
        if not is_sorted(proto.graph.node):
            model.graph.sort()
        return model

    # Lending: what is there is written down, in onnx-graphsurgeon's words and in its own.

    def _lend_graph(self, graph: gs.Graph, original: onnx.GraphProto) -> None:
        infos = {info.name: info for info in (*original.value_info, *original.input, *original.output)}
        read = {tensor.name for node in _nodes(graph) for tensor in node.inputs}
        unread = frozenset(tensor.name for tensor in original.initializer if tensor.name not in read)
        lent = LentGraph(graph, original, unread=unread)
        for tensor in graph.tensors().values():
            if tensor.name in infos:
                lent.values[tensor.name] = Lent(tensor, _value_info(tensor), infos[tensor.name])
        self._graphs[id(graph)] = lent
        for place, (node, proto) in enumerate(zip(graph.nodes, original.node, strict=True)):
            self._lend_node(node, proto, place)

    def _lend_node(self, node: gs.Node, original: onnx.NodeProto, place: int) -> None:
        bodies = {attribute.name: attribute.g for attribute in original.attribute if attribute.HasField("g")}
        for name, body in _bodies(node):
            self._lend_graph(body, bodies[name])
            self._bodies[(name, *_signature(node))] = self._graphs[id(body)]
        lent = Lent(node, self._as_written(node), original, place)
        self._nodes[id(node)] = lent
        self._nodes_by_output[_signature(node)] = lent

    # Taking back: what is written as it was then is replaced by what it really is.

    def _model(self, graph: gs.Graph) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._original)
        for name in ("producer_name", "producer_version", "ir_version"):
            if (getattr(graph, name) or getattr(proto, name)) != getattr(proto, name):
                setattr(proto, name, getattr(graph, name))
        del proto.functions[:]
        proto.functions.extend(self._function(function) for function in graph.functions)
        proto.graph.CopyFrom(self._main_graph(graph))
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

    def _main_graph(self, graph: gs.Graph) -> onnx.GraphProto:
        lent = self._graphs.get(id(graph), self._graphs[id(self.graph)])
        in_bodies = {t.name for one in self._graphs.values() if one is not lent for t in one.original.initializer}
        constants = {c.name: c for c in _constants(graph) if c.name not in in_bodies}
        stand_ins = [self._shelf.stand_in_for(constant) for constant in constants.values()]
        indices = {tensor.name: index for index, tensor in enumerate(lent.original.initializer)}
        stand_ins += [
            (indices[tensor.name], tensor)
            for tensor in lent.original.initializer
            if tensor.name in lent.unread and tensor.name not in constants
        ]
        return self._graph(graph, lent, [tensor for _, tensor in sorted(stand_ins, key=lambda pair: pair[0])])

    def _body(self, graph: gs.Graph, place: tuple[str, ...]) -> onnx.GraphProto:
        lent = self._graphs.get(id(graph)) or self._bodies.get(place)
        if lent is None:
            return self._graph(graph, LentGraph(graph, onnx.GraphProto()), [])
        own = {tensor.name for tensor in lent.original.initializer}
        read = {c.name: OnnxExporter.export_tensor_proto(c) for c in _constants(graph) if c.name in own}
        kept = {tensor.name: tensor for tensor in lent.original.initializer if tensor.name in lent.unread}
        return self._graph(graph, lent, [{**kept, **read}[name] for name in own if name in kept or name in read])

    def _graph(self, graph: gs.Graph, lent: LentGraph, initializers: list[onnx.TensorProto]) -> onnx.GraphProto:
        proto = onnx.GraphProto(name=graph.name or None, doc_string=graph.doc_string or None, initializer=initializers)
        proto.node.extend(self._ordered_nodes(graph))
        names = {tensor.name for tensor in initializers}
        overridable = [info for info in lent.original.input if info.name in names]  # initializers that are inputs too
        proto.input.extend(_restored(tensor, lent) for tensor in graph.inputs)
        proto.input.extend(overridable)
        proto.output.extend(_restored(tensor, lent) for tensor in graph.outputs)
        given = {info.name for info in (*proto.input, *proto.output)}
        proto.value_info.extend(info for info in lent.original.value_info if info.name in names)
        made = [tensor for node in graph.nodes for tensor in node.outputs if tensor.name and tensor.name not in given]
        infos = (_restored(tensor, lent) for tensor in made)
        proto.value_info.extend(info for info in infos if info.HasField("type") or info.metadata_props)
        names |= given | {tensor.name for tensor in made}
        annotations = lent.original.quantization_annotation
        proto.quantization_annotation.extend(one for one in annotations if one.tensor_name in names)
        proto.metadata_props.extend(lent.original.metadata_props)
        return proto

    def _ordered_nodes(self, graph: gs.Graph) -> list[onnx.NodeProto]:
        protos, origins = [], []
        for node in graph.nodes:
            now = self._as_written(node)
            lent = self._nodes.get(id(node)) or self._nodes_by_output.get(_signature(node))
            protos.append(now if lent is None else _merged_node(now, lent))
            origins.append(None if lent is None else lent.place)
        return in_original_order(protos, origins)

    def _as_written(self, node: gs.Node) -> onnx.NodeProto:
        """Return `node` as onnx-graphsurgeon writes it, with bodies restored."""
        bodies = dict(_bodies(node))
        proto = onnx.NodeProto(op_type=node.op, name=node.name or None, domain=node.domain)
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        for name, value in node.attrs.items():
            if name in bodies:
                proto.attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g.CopyFrom(
                    self._body(value, (name, *_signature(node)))
                )
            else:
                proto.attribute.extend(OnnxExporter.export_attributes({name: value}))
        return proto

    def _function(self, function: gs.Function) -> onnx.FunctionProto:
        now: onnx.FunctionProto = OnnxExporter.export_function(function)
        lent = next((one for one in self._functions if one.lent is function), None)
        return now if lent is None else _merged(now, lent)


def _merged(now: Proto, lent: Lent) -> Proto:
    """Return the original if it is written as before; else what is written now, with the original's metadata."""
    if _same(now, lent.before):
        original: Proto = lent.original
        return original
    for name in ("doc_string", "metadata_props", "overload"):
        if name in now.DESCRIPTOR.fields_by_name and not getattr(now, name):
            _copy_field(now, lent.original, name)
    return now


def _merged_node(now: onnx.NodeProto, lent: Lent) -> onnx.NodeProto:
    merged: onnx.NodeProto = _merged(now, lent)
    if merged is not now:
        return merged
    written = {attribute.name: attribute for attribute in lent.before.attribute}
    original = {attribute.name: attribute for attribute in lent.original.attribute}
    for attribute in merged.attribute:
        if attribute.name in written and _same(attribute, written[attribute.name]):
            attribute.CopyFrom(original[attribute.name])
    merged.attribute.extend(attribute for name, attribute in original.items() if name not in written)  # not carried
    return merged


def _restored(tensor: gs.Tensor, graph: LentGraph) -> onnx.ValueInfoProto:
    now = _value_info(tensor)
    lent = graph.values.get(tensor.name)
    return now if lent is None else _merged(now, lent)


def _value_info(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    if isinstance(tensor, gs.Variable) and tensor.type not in BODY_TYPES:
        return onnx.ValueInfoProto(name=tensor.name)
    info: onnx.ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, do_type_check=False)
    return info


def _copy_field(into: Proto, source: Proto, name: str) -> None:
    value = getattr(source, name)
    if isinstance(value, str):
        setattr(into, name, value)
    else:
        getattr(into, name).extend(value)


def _same(one: Any, other: Any) -> bool:
    return bool(one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True))


def _signature(node: gs.Node) -> tuple[str, ...]:
    """Return what tells a node of a copied graph from the others."""
    return (node.domain or "", node.op, *(tensor.name for tensor in node.outputs))


def _bodies(node: gs.Node) -> Iterator[tuple[str, gs.Graph]]:
    return ((name, value) for name, value in node.attrs.items() if isinstance(value, gs.Graph))


def _nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Yield the nodes of `graph` and of all bodies in it."""
    for node in graph.nodes:
        yield node
        for _, body in _bodies(node):
            yield from _nodes(body)


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    for node in _nodes(graph):
        yield from (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))
    yield from (tensor for tensor in graph.outputs if isinstance(tensor, gs.Constant))
