"""A model and the models that compute inputs of it, as one model: what they compute if they run one by one."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from kvsurgeon.graph.copies import copy_model
from kvsurgeon.passes.contract import Companion


def connected(model: ir.Model, companions: Mapping[str, Companion]) -> ir.Model:
    """Return one model that runs the companions before the model; the model itself if there are none."""
    if not companions:
        return model
    whole = copy_model(model)
    for name, companion in companions.items():
        _connect(whole.graph, copy_model(companion.model).graph, companion.connections, prefix=f"{name}:")
    whole.graph.sort()
    return whole


def _connect(graph: ir.Graph, first: ir.Graph, connections: Mapping[str, str], *, prefix: str) -> None:
    """Move the nodes of a graph into another, whose inputs they compute."""
    given = {value.name: value for value in graph.inputs}
    computed = {connections[value.name or ""]: value for value in first.outputs}
    first.outputs.clear()
    for value in list(first.inputs):
        first.inputs.remove(value)
        if value.name in given:
            value.replace_all_uses_with(given[value.name])
        else:
            graph.inputs.append(value)
    for value in list(first.initializers.values()):
        del first.initializers[value.name or ""]
        value.name = f"{prefix}{value.name}"
        graph.initializers[value.name] = value
    nodes = list(first)
    first.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}{node.name}" if node.name else node.name
        for value in node.outputs:
            value.name = f"{prefix}{value.name}"
    graph.extend(nodes)
    for name, value in computed.items():
        given[name].replace_all_uses_with(value)
        graph.inputs.remove(given[name])
