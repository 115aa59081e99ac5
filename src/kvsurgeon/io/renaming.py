"""Other names for files of external data: what a client looks for beside a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import onnx

from kvsurgeon.io.external_data import WeightFile


def numbered(first: str) -> Iterator[str]:
    """Yield `first`, `first_1`, `first_2`, ... without end."""
    yield first
    number = 1
    while True:
        yield f"{first}_{number}"
        number += 1


def renamed(files: Iterable[WeightFile], names: Mapping[str, str]) -> tuple[WeightFile, ...]:
    """Return the files under the locations that `names` gives them."""
    return tuple(replace(file, location=names.get(file.location, file.location)) for file in files)


def rename_locations(proto: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Let every external tensor of the model refer to the location that `names` has for its own."""
    for tensor in _tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names.get(entry.value, entry.value)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes.extend(graph.node)
        for attribute in nodes.pop().attribute if nodes else ():
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs += [*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs]
