"""DeepSparse: its text generation pipeline, which keeps caches of one length with left padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import required_inputs
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.query import downstream, is_operator, producer_of, producers, through, upstream
from kvsurgeon.interop.functions import as_pass_class
from kvsurgeon.ops.content import content_inputs, is_shape_only
from kvsurgeon.passes.interface.add_causal_mask_input import AddCausalMaskInput
from kvsurgeon.passes.interface.add_position_ids import AddPositionIds
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.passes.operators.concat_to_tile import ConcatToTile
from kvsurgeon.passes.operators.float16_mask_range import float16_mask_range
from kvsurgeon.passes.operators.fold_position_tables import FoldPositionTables
from kvsurgeon.passes.operators.reciprocal_to_div import ReciprocalToDiv
from kvsurgeon.passes.operators.remove_nan_guards import RemoveNanGuards
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
_WRITTEN_OPSET = 16  # without LayerNormalization
# What the engine computes itself, by its own count of supported operators, and by its results.
_COMPUTED = frozenset({
    "Add", "Cast", "Clip", "Concat", "DequantizeLinear", "Div", "Exp", "Expand", "Gemm", "Identity",
    "LeakyRelu", "MatMul", "Max", "Min", "Mul", "Neg", "Pow", "QuantizeLinear", "ReduceMax", "ReduceMean", "ReduceSum",
    "Relu", "Reshape", "Round", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh",
    "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
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
    if model.graph is not None:
        yield from _check_internal_cache(model, model.graph)
        yield from _check_flags(model.graph)
    if "causal_mask" not in model.input_names:
        yield warning("the model has no input causal_mask: DeepSparse runs the prompt token by token")


def _check_internal_cache(model: ModelInfo, graph: ir.Graph) -> Iterator[Incompatibility]:
    """Check that the engine computes everything between two caches, and does not leave a node to onnxruntime.

    Such a node splits the model. Its logits are then wrong from the second call on, without an error.
    """
    left = next((node for node in _between_caches(model, graph) if not _is_computed(node)), None)
    if left is not None:
        yield Incompatibility(
            f"expected operators between two attention layers that the engine of DeepSparse computes, as its internal "
            f"cache gives wrong tokens after others, found {left.op_type}",
            at=left.outputs[0].name,
        )
    cached = {pair.present.name for pair in model.cache}
    readers = [node for value in graph.outputs if value.name in cached for node, _ in value.uses()]
    reshaped = next((node for node in readers if is_operator(node, "Reshape")), None)
    if reshaped is not None and model.kv_heads == (1,):  # with more heads, the engine ends the process
        yield Incompatibility(
            "expected attention of rank 4, as the internal cache of DeepSparse gives wrong tokens for one KV head of "
            "rank 3, found a Reshape of a cached tensor",
            at=reshaped.outputs[0].name,
        )
    yield warning(
        "with its internal cache, the default of its pipeline, DeepSparse ends the process for some graphs, and gives "
        "wrong tokens for chunks of more than 64 tokens or of half of sequence_length",
        hint="internal_kv_cache=False runs the same folder with a cache in Python",
    )


def _check_flags(graph: ir.Graph) -> Iterator[Incompatibility]:
    """Check that no negative number becomes a bool: the engine computes false."""
    for node in graph:
        if not is_operator(node, "Cast") or node.attributes.get_int("to", 0) != ir.DataType.BOOL:
            continue
        chosen = producer_of(through(node.inputs[0], {"Cast", "Identity"}), "Where") if node.inputs[0] else None
        numbers = [small_constant(value) for value in chosen.inputs[1:] if value is not None] if chosen else []
        if any(array is not None and (array < 0).any() for array in numbers):
            yield Incompatibility(
                "expected no negative number that becomes a bool, as DeepSparse computes false, found a Cast of one",
                at=node.outputs[0].name,
            )


def _between_caches(model: ModelInfo, graph: ir.Graph) -> tuple[ir.Node, ...]:
    """Return the nodes on the ways from cached tensors to other cached tensors and to the nodes that read them."""
    presents = {pair.present.name for pair in model.cache}
    cached = [value for value in graph.outputs if value.name in presents]
    readers = [output for value in cached for node, _ in value.uses() for output in node.outputs]
    before = producers(upstream([*cached, *readers], inputs=content_inputs))
    after = producers(downstream(cached, stop=is_shape_only))
    return tuple(node for node in after if node in before and node.outputs[0] not in set(cached))


def _is_computed(node: ir.Node) -> bool:
    """Return whether the engine computes a node: `Erf` only as a part of a GELU, `Gather` only of one row."""
    if is_operator(node, "Erf"):
        return all(is_operator(user, "Add") for user, _ in node.outputs[0].uses())
    if is_operator(node, "Gather"):
        index = constant_tensor(node.inputs[1])
        return index is not None and len(index.shape) == 0
    return is_operator(node, *_COMPUTED)


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
        as_pass_class(float16_mask_range)(),  # onnxruntime computes NaN guards: RemoveNanGuards needs finite masks
        RemoveNanGuards(),
        ReciprocalToDiv(),
        LowerOpset(opset=_WRITTEN_OPSET),
    ),
    required=("input_ids", "attention_mask", "logits"),
    allowed_inputs=frozenset(_INPUTS),
    dtypes={name: {"int64"} for name in _INPUTS} | {"logits": {"float32"}},
    cache_dtypes={"float32", "uint8"},
    max_opset=_WRITTEN_OPSET,
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
