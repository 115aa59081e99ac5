"""Qualcomm Cloud AI 100, whose compiler keeps the cache on the device between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.interface.last_logits import LastLogits
from kvsurgeon.passes.interface.past_length_from_positions import PastLengthFromPositions
from kvsurgeon.passes.interface.remove_mask import RemoveMask
from kvsurgeon.passes.interface.rename_dims import RenameDims
from kvsurgeon.targets.compatibility import check_custom_operators
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Target

# Source: QEfficient, which compiles each model for a prefill of this many tokens per call, and for one.
PREFILL_LENGTH = 32
CONTEXT_LENGTH = 128


def specializations(model: ModelInfo) -> Mapping[str, Any]:
    """Return the sizes to compile for, as strings: prefill, and a decode step of one token."""
    context = CONTEXT_LENGTH if model.token_limit is None else model.token_limit
    sizes = (
        {"batch_size": "1", "seq_len": str(new), "ctx_len": str(context)} for new in (min(PREFILL_LENGTH, context), 1)
    )
    return {"specializations": list(sizes)}


def custom_io(model: ModelInfo) -> str:
    """Return the element type of each past and present on the device."""
    names = [pair.past.name for pair in model.cache] + [pair.present.name for pair in model.cache]
    return "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in names)


QAIC = Target(
    name="qaic",
    summary="qaic-exec -retained-state, for Qualcomm Cloud AI 100",
    tested_with="onnxruntime, by the requirements of QEfficient",
    cache=Inject(past="past_{kind}.{layer}", present="past_{kind}.{layer}_RetainedState", cache="static"),
    max_length=CONTEXT_LENGTH,
    finish=(
        RemoveMask(),
        RenameDims(dims=("batch_size=1",)),
        PastLengthFromPositions(),
        LastLogits(),
        RenameDims(dims=("sequence_length=seq_len", "max_length=ctx_len")),
    ),
    required=("input_ids", "position_ids", "logits"),
    allowed_inputs={"input_ids", "position_ids"},
    dtypes={name: {"int64"} for name in ("input_ids", "position_ids")},
    cache_dtypes={"float32", "float16"},
    static_axes=(1, 3),
    checks=(check_custom_operators,),
    side_files={"specializations.json": specializations, "custom_io.yaml": custom_io},
)
