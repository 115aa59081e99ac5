"""onnxruntime-genai: `og.Model(folder)`, which is told by genai_config.json what the graph's tensors are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.target import Obstacle, SideFile, Target

_INPUTS = ("input_ids", "attention_mask", "position_ids")
_IDS = frozenset(("int64", "int32"))
_ENDS = 0  # the token that ends a text where the config says none, as onnxruntime-genai has it too
_LONGEST = 4096  # tokens, where neither graph nor config say how far the model goes


def genai_config(facts: Facts, *, shared: bool = False) -> Mapping[str, Any]:
    """Return what onnxruntime-genai must know, read off the graph; only tokens and lengths come from the config.

    Args:
        facts: What it sees of the model.
        shared: Whether past and present are one buffer.
    """
    there = {tensor.name for tensor in facts.inputs}
    inputs = {name: name for name in _INPUTS if name in there}
    outputs = {"logits": "logits"}
    for kind in sorted({entry.kind for entry in facts.cache}):
        inputs[f"past_{kind}_names"] = f"past_key_values.%d.{kind}"
        outputs[f"present_{kind}_names"] = f"present.%d.{kind}"
    length = facts.max_length or _LONGEST
    bos, eos, pad = (_tokens(facts, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    tokens = {"bos_token_id": bos[:1], "eos_token_id": eos or [_ENDS], "pad_token_id": (pad or eos or [_ENDS])[:1]}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": facts.vocabulary,
            "context_length": length,
            **{name: said if len(said) > 1 else said[0] for name, said in tokens.items() if said},
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "num_hidden_layers": facts.layers,
                "num_attention_heads": facts.query_heads or max(facts.kv_heads),
                "num_key_value_heads": facts.kv_heads[0],
                "head_size": facts.head_dims[0],
                "inputs": inputs,
                "outputs": outputs,
            },
        },
        "search": {"max_length": length, "past_present_share_buffer": shared, "num_beams": 1},
    }


def _tokens(facts: Facts, name: str) -> list[int]:
    """Return the tokens of that name that the vocabulary has: others are refused when the folder is opened."""
    said = facts.config.get(name)
    listed = said if isinstance(said, list) else [said]
    return [token for token in listed if isinstance(token, int) and 0 <= token < (facts.vocabulary or 0)]


def _in_the_way(facts: Facts) -> Iterator[Obstacle]:
    if facts.vocabulary is None:
        yield Obstacle(what="expected logits of a width that is a number, found none", at="logits")
    if {entry.kind for entry in facts.cache} not in ({"key", "value"}, set()):
        yield Obstacle(what="expected a key and a value of each layer, found one tensor that is both")
    shapes: dict[int, Any] = {}
    for entry in facts.cache:
        if shapes.setdefault(entry.layer, entry.past.dims) != entry.past.dims:
            yield Obstacle(
                what=f"expected keys and values of one shape, found {list(shapes[entry.layer])} and "
                f"{list(entry.past.dims)}",
                at=entry.past.name,
            )
            return
    given = {facts_input.dtype for name in _INPUTS[1:] if (facts_input := facts.input(name)) is not None}
    if len(given) > 1:
        yield Obstacle(what="expected attention_mask and position_ids of one type, found int64 and int32")
    if facts.max_length is None:
        yield Obstacle(
            what=f"neither graph nor config say how long a text may be: genai_config.json says {_LONGEST} tokens",
            at="genai_config.json",
            stops=False,
        )
    if "position_ids" not in {tensor.name for tensor in facts.inputs}:
        yield Obstacle(
            what="the model is given no position_ids: padding, here on the right of a batch, shifts the positions "
            "that it counts itself",
            hint="add-position-ids first",
            stops=False,
        )
    if not _tokens(facts, "eos_token_id"):
        yield Obstacle(
            what=f"the config names no eos_token_id of the vocabulary, and there must be one: {_ENDS} ends a text",
            at="genai_config.json",
            stops=False,
        )


GENAI = Target(
    name="genai",
    summary="onnxruntime_genai.Model(folder) of onnxruntime-genai",
    tried="onnxruntime-genai 0.18.0",
    feeds=frozenset(_INPUTS),
    dtypes={name: _IDS for name in _INPUTS} | {"logits": frozenset(("float32", "float16", "bfloat16"))},
    cache_dtypes=frozenset(("float32", "float16", "bfloat16")),
    fixed_axes=(1, 3),
    beside=("tokenizer.json", "tokenizer_config.json"),
    side_files=(SideFile(name="genai_config.json", write=genai_config),),
    rules=(_in_the_way,),
)

# Its own operator writes into the buffer, and is told how many rows are filled by a mask for the tokens so far.
GENAI_SHARED_BUFFER = replace(
    GENAI,
    name="genai-shared-buffer",
    summary="onnxruntime_genai.Model(folder) of onnxruntime-genai, past and present in one buffer",
    cache=Inject(cache="static", past_length="mask"),
    after=(FuseAttention(),),
    side_files=(SideFile(name="genai_config.json", write=partial(genai_config, shared=True)),),
)
