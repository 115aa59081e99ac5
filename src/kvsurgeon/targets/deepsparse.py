"""DeepSparse: its text generation pipeline, which keeps caches of one length and pads them on the left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsurgeon.passes.interface.add_causal_mask_input import AddCausalMaskInput
from kvsurgeon.passes.interface.add_position_ids import AddPositionIds
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.passes.operators.concat_to_tile import ConcatToTile
from kvsurgeon.passes.opset.lower_opset import LowerOpset
from kvsurgeon.targets.facts import Facts
from kvsurgeon.targets.target import Obstacle, SideFile, Target
from kvsurgeon.targets.tokenizers import CONFIG_BEFORE_5, MERGES_AS_TEXT

_OPSET = 17  # the newest that its own engine loads; onnxruntime under it takes 19
# compute_engine_inputs takes the first two by their place, and makes the last one after the others
_ORDER = ("input_ids", "attention_mask", "positions", "causal_mask")
_SHIFTED = frozenset(("causal", "sliding-window"))  # masks that are the same wherever a text begins


def _in_the_way(facts: Facts) -> Iterator[Obstacle]:
    names = [tensor.name for tensor in facts.inputs]
    if names != [name for name in _ORDER if name in names]:
        yield Obstacle(what=f"expected inputs in the order {', '.join(_ORDER)}, found {', '.join(names)}")
    outputs = [tensor.name for tensor in facts.outputs]
    if outputs[:1] != ["logits"] or len(outputs) > 1:
        yield Obstacle(what=f"expected logits as the only output beside the caches, found {', '.join(outputs)}")
    for attention in () if facts.decoder is None else facts.decoder.attentions:
        if attention.mask.kind not in _SHIFTED:
            yield Obstacle(
                what=f"layer {attention.layer}: expected a mask that is the same wherever a text begins, as it begins "
                f"behind padding, found a {attention.mask.kind} mask",
                at=attention.output,
            )
            break
    if facts.input("causal_mask") is None:
        yield Obstacle(
            what="the model has no causal_mask input: DeepSparse takes its prompt token by token", stops=False
        )


def _some_config(facts: Facts) -> Mapping[str, Any] | None:
    """Return a config where the source has none: the pipeline opens one, and reads nothing in it."""
    return None if facts.config else {"use_cache": True}


DEEPSPARSE = Target(
    name="deepsparse",
    summary="deepsparse.TextGeneration(model_path=folder, internal_kv_cache=False), batch 1",
    tried="deepsparse 1.8.0",
    before=(RenameIo(names=("position_ids:positions",)), AddPositionIds(input="positions")),
    after=(AddCausalMaskInput(), ConcatToTile(), LowerOpset(opset=_OPSET)),
    needs=("input_ids", "attention_mask", "logits"),
    feeds=frozenset(_ORDER),
    dtypes={name: frozenset(("int64",)) for name in _ORDER} | {"logits": frozenset(("float32",))},
    cache_dtypes=frozenset(("float32", "uint8")),
    opset=_OPSET,
    fixed_axes=(1, 3),
    uniform=True,
    beside=("tokenizer.json", "tokenizer_config.json"),
    side_files=(SideFile(name="config.json", write=_some_config), CONFIG_BEFORE_5, MERGES_AS_TEXT),
    rules=(_in_the_way,),
)
