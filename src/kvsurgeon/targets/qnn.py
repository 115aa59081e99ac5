"""Qualcomm's neural network runtime (QNN) on phones and laptops, used by Genie."""

from __future__ import annotations

import json
from collections.abc import Iterator

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.host_inputs.host_inputs import HostInputs
from kvsurgeon.passes.interface.integer_inputs import Int32Inputs
from kvsurgeon.passes.interface.rename_dims import RenameDims
from kvsurgeon.passes.operators.gather_nd_to_gather import GatherNdToGather
from kvsurgeon.passes.operators.remove_nan_guards import RemoveNanGuards
from kvsurgeon.rewrite.cache_metadata import CONTEXT_KEY
from kvsurgeon.targets.compatibility import check_custom_operators
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target

# Source: the language models of Qualcomm AI Hub. Keys are transposed, only new rows are returned, and the host computes
# masks and rotary tables. Operators that a phone does not implement only computed these.
UNSUPPORTED_OPERATORS = frozenset(
    ("", name) for name in ("Range", "IsNaN", "Trilu", "GatherND", "NonZero", "Loop", "If", "Unique")
)


def host_context(model: ModelInfo) -> str | None:
    """Return the description of the masks and tables that the host computes; None if there are none."""
    description = model.metadata.get(CONTEXT_KEY)
    return None if description is None else f"{description}\n"


def _check_tables(model: ModelInfo) -> Iterator[Incompatibility]:
    """Check that masks and tables are described for as many tokens as the cache holds."""
    places = json.loads(model.metadata.get(CONTEXT_KEY, "{}")).get("places")
    if places is not None and model.token_limit is not None and places < model.token_limit:
        yield Incompatibility(
            f"expected masks and tables for {model.token_limit} tokens, found {places}",
            at="context.json", hint=f"--max-length {places}"
        )  # fmt: skip


QNN = Target(
    name="qnn",
    summary="Genie, of Qualcomm AI Engine Direct",
    tested_with="onnxruntime, by the requirements of Qualcomm AI Hub",
    cache=Inject(
        past="past_{kind}_{layer}_in",
        present="past_{kind}_{layer}_out",
        cache="new-tokens",
        key_layout=("kv_heads", "batch", "head_dim", "sequence"),
        value_layout=("kv_heads", "batch", "sequence", "head_dim"),
    ),
    max_length=1024,
    variants={"prefill.onnx": 128, "decode.onnx": 1},
    data="weights.data",
    finish=(
        HostInputs(),
        RemoveNanGuards(),
        GatherNdToGather(),
        RenameDims(dims=("batch_size=1", "past_sequence_length=cache_length", "total_sequence_length=max_length")),
        Int32Inputs(),
    ),
    required=("input_ids", "attention_mask", "logits"),
    dtypes={"input_ids": {"int32"}},
    cache_dtypes={"float32", "float16"},
    unsupported_operators=UNSUPPORTED_OPERATORS,
    checks=(_check_tables, check_custom_operators),
    side_files={"context.json": host_context},
)
