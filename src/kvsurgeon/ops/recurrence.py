"""Operators that pass a state from token to token."""

from __future__ import annotations

from kvsurgeon.ops.operator import Operator, Trait, entries
from kvsurgeon.ops.schema import by_schema

OPERATORS: list[Operator] = [*entries("LSTM GRU RNN Scan", by_schema, None, Trait.RECURRENT)]
