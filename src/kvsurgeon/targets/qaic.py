"""qaic: Qualcomm Cloud AI 100, whose compiler keeps a cache on the device from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.interface.last_logits import LastLogits
from kvsurgeon.passes.interface.past_length_from_positions import PastLengthFromPositions
from kvsurgeon.passes.interface.remove_mask import RemoveMask
from kvsurgeon.passes.interface.rename_dims import RenameDims
from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.foreign import foreign_operators
from kvsurgeon.targets.target import SideFile, Target

# Source: QEfficient, which compiles each model for a prompt of so many tokens at a time, and for one.
PREFILL = 32
CONTEXT = 128


def specializations(facts: Facts) -> Mapping[str, Any]:
    """Return the sizes to compile for, as numbers in quotes: prefill, and a step of one token."""
    context = CONTEXT if facts.room is None else facts.room
    sizes = ({"batch_size": "1", "seq_len": str(new), "ctx_len": str(context)} for new in (min(PREFILL, context), 1))
    return {"specializations": list(sizes)}


def custom_io(facts: Facts) -> str:
    """Return the types that caches have on the device: the input and the output that is its memory."""
    names = [(entry.past.name, entry.present.name) for entry in facts.cache]
    ordered = [past for past, _ in names] + [present for _, present in names]
    return "".join(f" - IOName: {name}\n   Precision: float16\n\n" for name in ordered)


QAIC = Target(
    name="qaic",
    summary="qaic-exec -retained-state, for Qualcomm Cloud AI 100",
    tried="the contract of QEfficient; in onnxruntime",
    cache=Inject(past="past_{kind}.{layer}", present="past_{kind}.{layer}_RetainedState", cache="static"),
    max_length=CONTEXT,
    finish=(
        RemoveMask(),
        RenameDims(dims=("batch_size=1",)),
        PastLengthFromPositions(),
        LastLogits(),
        RenameDims(dims=("sequence_length=seq_len", "max_length=ctx_len")),
    ),
    needs=("input_ids", "position_ids", "logits"),
    feeds=frozenset(("input_ids", "position_ids")),
    dtypes={name: frozenset(("int64",)) for name in ("input_ids", "position_ids")},
    cache_dtypes=frozenset(("float32", "float16")),
    fixed_axes=(1, 3),
    rules=(foreign_operators,),
    side_files=(
        SideFile(name="specializations.json", write=specializations),
        SideFile(name="custom_io.yaml", write=custom_io),
    ),
)
