"""Which values are token data."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind


def is_token(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Return whether a value is token data."""
    return value is not None and flow.kinds.get(value) is ValueKind.TOKEN


def token_inputs(flow: TokenFlow, node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that are token data, each once."""
    return list(dict.fromkeys(value for value in node.inputs if value is not None and is_token(flow, value)))
