"""Equivalent rewrites of a model, which must not change the result of injection.

Each takes a model and numbers to draw from, and returns another that computes the same for the same inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import onnx
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from mutating.mutable_graph import Graph

Rewrite = Callable[[onnx.ModelProto, Random], onnx.ModelProto]

WIDER = {  # what a cast to and back again loses nothing in
    TensorProto.FLOAT: TensorProto.DOUBLE,
    TensorProto.FLOAT16: TensorProto.FLOAT,
    TensorProto.INT32: TensorProto.INT64,
    TensorProto.INT64: TensorProto.INT64,
    TensorProto.BOOL: TensorProto.INT32,
}
FRESH = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
EDGES = 40  # that something is put on
COPIES = 40  # of nodes that compute shapes


def plain(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """The model as it is."""
    return model


def renamed(model: onnx.ModelProto, random: Random) -> onnx.ModelProto:
    """Every value, node, dimension and the graph itself has a name that says nothing; inputs and outputs too."""
    names: dict[str, str] = {"": ""}

    def noise(name: str) -> str:
        return names.setdefault(name, f"{random.getrandbits(48):x}_{len(names)}")

    for graph in _graphs(model.graph):
        graph.name = noise(graph.name)
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.name = noise(value.name)
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param:
                    size.dim_param = noise(f"dim {size.dim_param}")
        for tensor in graph.initializer:
            tensor.name = noise(tensor.name)
        for node in graph.node:
            node.name = noise(f"node {len(names)}")
            node.input[:] = [noise(name) for name in node.input]
            node.output[:] = [noise(name) for name in node.output]
    return model


def with_interface_of(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """Give inputs and outputs that two models share by place the names that they have in the original."""
    weights = {tensor.name for tensor in (*model.graph.initializer, *original.graph.initializer)}
    pairs = [*zip(_fed(model, weights), _fed(original, weights), strict=False)]
    pairs += zip(model.graph.output, original.graph.output, strict=False)
    names = {mine.name: theirs.name for mine, theirs in pairs}
    for graph in _graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.name = names.get(value.name, value.name)
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
    return model


def _fed(model: onnx.ModelProto, weights: set[str]) -> list[onnx.ValueInfoProto]:
    return [value for value in model.graph.input if value.name not in weights]


def undeclared(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Nothing is said of shapes and types between inputs and outputs, nor of where nodes come from."""
    for graph in _graphs(model.graph):
        del graph.value_info[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    return model


def shuffled(model: onnx.ModelProto, random: Random) -> onnx.ModelProto:
    """Sort the nodes into another topological order."""
    nodes = list(model.graph.node)
    made = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    needed = [{made[name] for name in _reads(node) if name in made} for node in nodes]
    readers: dict[int, list[int]] = defaultdict(list)
    for number, sources in enumerate(needed):
        for source in sources:
            readers[source].append(number)
    ready = [number for number, sources in enumerate(needed) if not sources]
    order = []
    while ready:
        number = ready.pop(random.randrange(len(ready)))
        order.append(nodes[number])
        for reader in readers[number]:
            needed[reader].discard(number)
            if not needed[reader]:
                ready.append(reader)
    assert len(order) == len(nodes)
    del model.graph.node[:]
    model.graph.node.extend(order)
    return model


def stretched(model: onnx.ModelProto, random: Random) -> onnx.ModelProto:
    """Insert on random edges an `Identity`, or a `Cast` to a wider type and back."""
    graph = Graph(model=model, random=random)
    edges = [
        edge for edge in graph.edges(lambda dtype, rank: dtype in WIDER) if _may_be_computed(edge.node, edge.index)
    ]
    for edge in random.sample(edges, min(EDGES, len(edges))):
        dtype = graph.type_of(edge.value)
        if random.random() < 0.5:
            graph.rewire(edge, graph.before(edge.node, "Identity", [edge.value]))
            continue
        wide = graph.before(edge.node, "Cast", [edge.value], to=WIDER[dtype])
        graph.rewire(edge, graph.before(edge.node, "Cast", [wide], to=dtype))
    return model


def _may_be_computed(node: NodeProto, index: int) -> bool:
    """Ranges of quantized operators and numbers of kernels must be known to onnxruntime beforehand."""
    return index == 0 or (node.domain in ("", "ai.onnx") and "Linear" not in node.op_type)


def constants_as_nodes(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Every small constant is made by a `Constant` node."""
    given = {value.name for value in model.graph.input}
    moved = [t for t in model.graph.initializer if t.name not in given and t.data_location != TensorProto.EXTERNAL]
    small = [tensor for tensor in moved if tensor.ByteSize() < 4096]
    kept = [tensor for tensor in model.graph.initializer if not any(tensor is one for one in small)]
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in small]
    nodes += list(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
    return model


def constants_as_initializers(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Every `Constant` node that holds a tensor is an initializer."""
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]
    shown = {value.name for value in model.graph.output}
    for node in constants:
        if node.output[0] in shown:
            continue
        tensor = TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        model.graph.initializer.append(tensor)
        model.graph.node.remove(node)
    return model


def copied(model: onnx.ModelProto, random: Random) -> onnx.ModelProto:
    """Compute shapes, and values derived from them, again for some of their consumers."""
    graph = Graph(model=model, random=random)
    for _ in range(COPIES):
        edge = graph.pick(graph.edges(lambda dtype, rank: dtype == TensorProto.INT64 and rank <= 1))
        maker = None if edge is None else graph.makers()[edge.value]
        if maker is None or any(attribute.HasField("g") for attribute in maker.attribute):
            continue
        twin = NodeProto()
        twin.CopyFrom(maker)
        twin.name = ""
        twin.output[:] = [f"{name}.twin{len(model.graph.node)}" if name else "" for name in maker.output]
        model.graph.node.insert(list(model.graph.node).index(edge.node), twin)
        graph.rewire(edge, twin.output[list(maker.output).index(edge.value)])
    return model


def shared(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Merge common subexpressions."""
    kept: dict[bytes, NodeProto] = {}
    instead: dict[str, str] = {}
    shown = {value.name for value in model.graph.output}
    for graph in _graphs(model.graph):
        for node in list(graph.node):
            node.input[:] = [instead.get(name, name) for name in node.input]
            if graph is not model.graph or node.op_type in FRESH or shown & {*node.output}:
                continue
            twin = kept.setdefault(_what(node), node)
            if twin is not node:
                instead.update(zip(node.output, twin.output, strict=True))
                graph.node.remove(node)
    return model


def _what(node: NodeProto) -> bytes:
    what = NodeProto()
    what.CopyFrom(node)
    del what.output[:], what.metadata_props[:]
    what.name = what.doc_string = ""
    return what.SerializeToString(deterministic=True) + str(len(node.output)).encode()


def optimized_by_onnxruntime(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Apply onnxruntime's basic optimizations."""
    with TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def slimmed(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Apply onnxslim."""
    import onnxslim

    return onnxslim.slim(model)


def simplified(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Apply onnxsim."""
    import onnxsim

    return onnxsim.simplify(model)[0]


def in_4_bits(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Apply onnxruntime's quantizer of weights to 4 bits, which reorders nodes; its own outputs are the reference."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(model, block_size=16, is_symmetric=True)
    quantizer.process()
    return quantizer.model.model


def in_8_bits(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Apply onnxruntime's dynamic quantizer, which also quantizes convolutions; its own outputs are the reference."""
    from onnxruntime.quantization import quantize_dynamic

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(model, path)
        return onnx.load(path)


def in_16_bits(model: onnx.ModelProto, _random: Random) -> onnx.ModelProto:
    """Apply onnxruntime's converter to float16, whose own outputs are the reference.

    Raises whatever onnxruntime raises for a model that it cannot run then, as one in 8 bits.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(model, keep_io_types=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return model


WRITTEN: tuple[Rewrite, ...] = (
    renamed, undeclared, shuffled, stretched, constants_as_nodes, constants_as_initializers, copied, shared,
)  # fmt: skip
BY_TOOLS: tuple[Rewrite, ...] = (optimized_by_onnxruntime, in_4_bits, in_8_bits, in_16_bits, slimmed, simplified)


def everything(model: onnx.ModelProto, random: Random) -> onnx.ModelProto:
    """All that is written here, in some order."""
    for rewrite in random.sample(WRITTEN, len(WRITTEN)):
        model = rewrite(model, random)
    return model


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _reads(node: NodeProto) -> Iterable[str]:
    """Every value that a node reads, those that its branches capture included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _reads(inner)
            yield from (value.name for value in attribute.g.output)
