"""A model and the models that compute inputs of it, as one model: what they compute if they run one by one."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.copies import copy_model, move_nodes
from kvsurgeon.passes.contract import Companion


def connected(model: ir.Model, companions: Mapping[str, Companion]) -> ir.Model:
    """Return one model that runs the companions before the model; the model itself if there are none."""
    companions = {name: companion for name, companion in companions.items() if companion.connections}
    if not companions:
        return model
    whole = copy_model(model)
    for name, companion in companions.items():
        _connect(whole.graph, copy_model(companion.model).graph, companion.connections, prefix=f"{name}:")
    whole.graph.sort()
    return whole


def appended(encoder: ir.Model, companions: Mapping[str, Companion]) -> ir.Model:
    """Return an encoder that also computes what the companions compute from its first output.

    Raises:
        UnsupportedError: A companion has further inputs, or other versions of operators.
    """
    if not companions:
        return encoder
    whole = copy_model(encoder)
    for name, companion in companions.items():
        model = copy_model(companion.model)
        if len(model.graph.inputs) != 1:
            raise UnsupportedError(
                "keys and values of cross-attention are not computed from the output of the encoder alone",
                code=Code.TARGET, found=" and ".join(f"`{value.name}`" for value in model.graph.inputs),
            )  # fmt: skip
        _add_imports(whole, model)
        given = {value.name or "": whole.graph.outputs[0] for value in model.graph.inputs}
        names = [value.name for value in model.graph.outputs]
        outputs = move_nodes(model.graph, whole.graph, given, prefix=f"{name}:")
        for value, output in zip(outputs, names, strict=True):
            value.name = output
        whole.graph.outputs.extend(outputs)
    return whole


def _add_imports(model: ir.Model, other: ir.Model) -> None:
    """Add the operator versions and functions of another model.

    Raises:
        UnsupportedError: Both models have different ones under one name.
    """
    mine, others = model.graph.opset_imports, other.graph.opset_imports
    for domain in mine.keys() & others.keys():
        if mine[domain] != others[domain]:
            raise UnsupportedError(
                "encoder and decoder have different versions of operators", code=Code.TARGET,
                expected=f"opset {others[domain]}, as the decoder has", found=f"opset {mine[domain]} in the encoder",
                hint="export both with one opset",
            )  # fmt: skip
    if other.functions:
        raise UnsupportedError(
            "the decoder has local functions", code=Code.TARGET, hint="inline them, as by onnx.inliner"
        )
    mine.update(others)


def _connect(graph: ir.Graph, first: ir.Graph, connections: Mapping[str, str], *, prefix: str) -> None:
    """Move the nodes of a graph into another, whose inputs they compute."""
    given = {value.name or "": value for value in graph.inputs}
    taken = [given[connections[value.name or ""]] for value in first.outputs]
    for value, computed in zip(taken, move_nodes(first, graph, given, prefix=prefix), strict=True):
        value.replace_all_uses_with(computed)
        graph.inputs.remove(value)
