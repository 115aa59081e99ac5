"""qnn: Qualcomm's neural network runtime on phones and laptops, driven by Genie."""

from __future__ import annotations

import json
from collections.abc import Iterator

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.host_inputs.host_inputs import KEY, HostInputs
from kvsurgeon.passes.interface.integer_inputs import Int32Inputs
from kvsurgeon.passes.interface.rename_dims import RenameDims
from kvsurgeon.passes.operators.gather_nd_to_gather import GatherNdToGather
from kvsurgeon.passes.operators.remove_nan_guards import RemoveNanGuards
from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.foreign import foreign_operators
from kvsurgeon.targets.target import Obstacle, SideFile, Target, Variant

# Source: the language models of Qualcomm AI Hub. Keys lie transposed, only new rows come out, and the host makes masks
# and rotary tables. What a phone has no operator for is gone with the context that it made.
BANNED = frozenset(("", name) for name in ("Range", "IsNaN", "Trilu", "GatherND", "NonZero", "Loop", "If", "Unique"))


def context(facts: Facts) -> str | None:
    """Return what the host must know to make masks and tables."""
    told = facts.metadata.get(KEY)
    return None if told is None else f"{told}\n"


def _told_enough(facts: Facts) -> Iterator[Obstacle]:
    """Yield that masks and tables are told of for fewer tokens than the cache holds."""
    places = json.loads(facts.metadata.get(KEY, "{}")).get("places")
    if places is not None and facts.room is not None and places < facts.room:
        yield Obstacle(
            what=f"expected masks and tables for {facts.room} tokens, found them for {places}",
            at="context.json", hint=f"--max-length {places}",
        )  # fmt: skip


QNN = Target(
    name="qnn",
    summary="Genie, of Qualcomm AI Engine Direct",
    tried="the contract of Qualcomm AI Hub; in onnxruntime",
    cache=Inject(
        past="past_{kind}_{layer}_in",
        present="past_{kind}_{layer}_out",
        cache="new-tokens",
        key_layout=("kv_heads", "batch", "head_dim", "sequence"),
        value_layout=("kv_heads", "batch", "sequence", "head_dim"),
    ),
    max_length=1024,
    variants=(Variant(file="prefill.onnx", tokens=128), Variant(file="decode.onnx", tokens=1)),
    data="weights.data",
    finish=(
        HostInputs(),
        RemoveNanGuards(),
        GatherNdToGather(),
        RenameDims(dims=("batch_size=1", "past_sequence_length=cache_length", "total_sequence_length=max_length")),
        Int32Inputs(),
    ),
    needs=("input_ids", "attention_mask", "logits"),
    dtypes={"input_ids": frozenset(("int32",))},
    cache_dtypes=frozenset(("float32", "float16")),
    banned=BANNED,
    rules=(_told_enough, foreign_operators),
    side_files=(SideFile(name="context.json", write=context),),
)
