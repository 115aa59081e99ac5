"""DeepSparse: its text generation pipeline, which keeps caches of one length with left padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import required_inputs
from kvsurgeon.passes.interface.add_causal_mask_input import AddCausalMaskInput
from kvsurgeon.passes.interface.add_position_ids import AddPositionIds
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.passes.operators.concat_to_tile import ConcatToTile
from kvsurgeon.passes.operators.fold_position_tables import FoldPositionTables
from kvsurgeon.passes.operators.unmerge_heads import UnmergeHeads
from kvsurgeon.passes.opset.lower_opset import LowerOpset
from kvsurgeon.targets.hugging_face_files import (
    tokenizer_config_before_5,
    tokenizer_with_text_merges,
    with_chat_template,
)
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target, warning

_OPSET, _IR_VERSION = 17, 9  # the newest that its own engine loads; onnxruntime under it loads 19
# compute_engine_inputs takes the first two by their index, and computes the last one from the others
_INPUTS = ("input_ids", "attention_mask", "positions", "causal_mask")
_SHIFT_INVARIANT = {"causal", "sliding-window"}  # masks that depend only on the distance of query and key


def _check(model: ModelInfo) -> Iterator[Incompatibility]:
    if list(model.input_names) != [name for name in _INPUTS if name in model.input_names]:
        yield Incompatibility(
            f"expected inputs in the order {', '.join(_INPUTS)}, found {', '.join(model.input_names)}"
        )
    outputs = [tensor.name for tensor in model.outputs]
    if outputs != ["logits"]:
        yield Incompatibility(f"expected logits as the only output besides the cache, found {', '.join(outputs)}")
    attentions = () if model.decoder is None else model.decoder.attentions
    other = next((one for one in attentions if one.mask.kind not in _SHIFT_INVARIANT), None)
    if other is not None:
        yield Incompatibility(
            f"layer {other.layer}: expected a causal or sliding window mask, as left padding shifts the text, "
            f"found mask {other.mask.kind}",
            at=other.output,
        )
    yield warning(
        "the internal cache of DeepSparse, the default of its pipeline, gives other tokens for many graphs, or ends "
        "the process",
        hint="internal_kv_cache=False runs the same folder with a cache in Python",
    )
    if "causal_mask" not in model.input_names:
        yield warning("the model has no input causal_mask: DeepSparse runs the prompt token by token")


def is_misread(model: ir.Model) -> bool:
    """Return whether DeepSparse loads a model with a cache that is not in its form, and gives other tokens.

    It rejects inputs of other names and later versions, with an error.
    """
    names = {value.name for value in required_inputs(model.graph)}
    others = {name for name in names if name not in _INPUTS and not str(name).startswith("past_key_values")}
    loaded = not others and (model.graph.opset_imports.get("") or 0) <= _OPSET and model.ir_version <= _IR_VERSION
    return loaded and "causal_mask" not in names


def _config(model: ModelInfo) -> Mapping[str, Any] | None:
    """Return a config if the source has none: the pipeline opens one, but reads no key of it."""
    return None if model.config else {"use_cache": True}


DEEPSPARSE = Target(
    name="deepsparse",
    summary="deepsparse.TextGeneration(model_path=folder), batch 1",
    tested_with="deepsparse 1.8.0",
    before=(RenameIo(names=("position_ids:positions",)), AddPositionIds(input="positions")),
    after=(
        UnmergeHeads(),
        FoldPositionTables(input="positions"),
        AddCausalMaskInput(),
        ConcatToTile(),
        LowerOpset(opset=_OPSET),
    ),
    required=("input_ids", "attention_mask", "logits"),
    allowed_inputs=frozenset(_INPUTS),
    dtypes={name: {"int64"} for name in _INPUTS} | {"logits": {"float32"}},
    cache_dtypes={"float32", "uint8"},
    max_opset=_OPSET,
    static_axes=(1, 3),
    uniform=True,
    required_files=("tokenizer.json", "tokenizer_config.json"),
    side_files={
        "config.json": _config,
        "tokenizer_config.json": lambda model: with_chat_template(model, tokenizer_config_before_5(model)),
        "tokenizer.json": tokenizer_with_text_merges,
    },
    checks=(_check,),
)
