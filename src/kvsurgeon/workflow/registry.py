"""The catalogue of passes."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

from kvsurgeon.errors import PluginError
from kvsurgeon.passes.options import options_of
from kvsurgeon.plugins import Catalogue, Plugin

BUILT_IN = {
    "inject": "kvsurgeon.passes.cache.inject:Inject",
    "remove-cache": "kvsurgeon.passes.cache.remove_cache:RemoveCache",
    "quantize-cache": "kvsurgeon.passes.cache.quantize_cache:QuantizeCache",
    "window-cache": "kvsurgeon.passes.cache.window_cache:WindowCache",
    "latent-cache": "kvsurgeon.passes.cache.latent_cache:LatentCache",
    "retarget": "kvsurgeon.passes.cache.retarget:Retarget",
    "separate-cross-attention": "kvsurgeon.passes.cache.separate_cross_attention:SeparateCrossAttention",
    "separate-prefill": "kvsurgeon.passes.cache.separate_prefill:SeparatePrefill",
    "remove-mask": "kvsurgeon.passes.interface.remove_mask:RemoveMask",
    "add-batch-index": "kvsurgeon.passes.interface.add_batch_index:AddBatchIndex",
    "add-query-lengths": "kvsurgeon.passes.interface.add_query_lengths:AddQueryLengths",
    "add-causal-mask-input": "kvsurgeon.passes.interface.add_causal_mask_input:AddCausalMaskInput",
    "past-length-from-positions": "kvsurgeon.passes.interface.past_length_from_positions:PastLengthFromPositions",
    "last-logits": "kvsurgeon.passes.interface.last_logits:LastLogits",
    "num-logits-to-keep": "kvsurgeon.passes.interface.num_logits_to_keep:NumLogitsToKeep",
    "rename-dims": "kvsurgeon.passes.interface.rename_dims:RenameDims",
    "host-inputs": "kvsurgeon.passes.host_inputs.host_inputs:HostInputs",
    "int32-inputs": "kvsurgeon.passes.interface.integer_inputs:Int32Inputs",
    "int64-inputs": "kvsurgeon.passes.interface.integer_inputs:Int64Inputs",
    "remove-nan-guards": "kvsurgeon.passes.operators.remove_nan_guards:RemoveNanGuards",
    "gather-nd-to-gather": "kvsurgeon.passes.operators.gather_nd_to_gather:GatherNdToGather",
    "raise-opset": "kvsurgeon.passes.opset.raise_opset:RaiseOpset",
    "lower-opset": "kvsurgeon.passes.opset.lower_opset:LowerOpset",
    "float16-mask-range": "kvsurgeon.passes.operators.float16_mask_range:float16_mask_range",
    "fix-shapes": "kvsurgeon.passes.shapes.fix_shapes:FixShapes",
    "chunk-length": "kvsurgeon.passes.operators.chunk_length:ChunkLength",
    "einsum-to-matmul": "kvsurgeon.passes.operators.einsum_to_matmul:EinsumToMatmul",
    "concat-to-tile": "kvsurgeon.passes.operators.concat_to_tile:ConcatToTile",
    "fold-position-tables": "kvsurgeon.passes.operators.fold_position_tables:FoldPositionTables",
    "unmerge-heads": "kvsurgeon.passes.operators.unmerge_heads:UnmergeHeads",
    "reciprocal-to-div": "kvsurgeon.passes.operators.reciprocal_to_div:ReciprocalToDiv",
    "store-transposed-weights": "kvsurgeon.passes.operators.store_transposed_weights:StoreTransposedWeights",
    "pack-projections": "kvsurgeon.passes.operators.pack_projections:PackProjections",
    "fuse-causal-convs": "kvsurgeon.passes.operators.fuse_causal_convs:FuseCausalConvs",
    "fuse-linear-attention": "kvsurgeon.passes.operators.fuse_linear_attention:FuseLinearAttention",
    "fuse-skip-norms": "kvsurgeon.passes.operators.fuse_skip_norms:FuseSkipNorms",
    "optimize": "kvsurgeon.passes.operators.optimize:Optimize",
    "fuse-rotary": "kvsurgeon.passes.operators.fuse_rotary:FuseRotary",
    "fuse-attention": "kvsurgeon.passes.operators.fuse_attention:FuseAttention",
    "replicate-kv-heads": "kvsurgeon.passes.heads.replicate_kv_heads:ReplicateKvHeads",
    "expand-gqa": "kvsurgeon.passes.heads.expand_gqa:ExpandGqa",
    "merge-kv-heads": "kvsurgeon.passes.heads.merge_kv_heads:MergeKvHeads",
    "share-kv-layers": "kvsurgeon.passes.heads.share_kv_layers:ShareKvLayers",
    "low-rank-values": "kvsurgeon.passes.heads.low_rank_values:LowRankValues",
    "swiftkv": "kvsurgeon.passes.heads.swiftkv:SwiftKv",
    "uptrain": "kvsurgeon.passes.heads.uptrain:Uptrain",
    "add-position-ids": "kvsurgeon.passes.interface.add_position_ids:AddPositionIds",
    "name-states": "kvsurgeon.passes.interface.name_states:NameStates",
    "rename-io": "kvsurgeon.passes.interface.rename_io:RenameIo",
}

# Names that a pass may not have.
COMMANDS = ("inspect", "run", "passes", "targets", "verify", "plot", "report", "generate", "demo")


def summary_of(plugin: Plugin[type[Any]]) -> str:
    """Return the first docstring line of a pass without importing it."""
    if not plugin.built_in:
        return f"From {plugin.package}."
    module, _, name = plugin.reference.partition(":")
    path = Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")
    body = ast.parse(path.read_text("utf-8")).body
    defined = (node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    docstrings = (ast.get_docstring(node) for node in defined if node.name == name)
    return (next(docstrings, None) or "").partition("\n")[0]


def _check(plugin: Plugin[type[Any]], found: Any) -> type[Any]:
    if inspect.isfunction(found):
        from kvsurgeon.interop.functions import as_pass_class

        return as_pass_class(found, plugin.name)
    if not inspect.isclass(found):
        raise PluginError(f"{plugin}: expected a pass class or a function, found {type(found).__name__}")
    if not callable(getattr(found, "apply", None)):
        raise PluginError(f"{plugin}: expected a class with a method `apply`, found none")
    name = getattr(found, "name", plugin.name)
    if name != plugin.name:
        raise PluginError(f"{plugin}: the class is called {name}; give both the same name")
    options_of(found)  # fails if a field has an unknown type
    return found


PASSES = Catalogue(kind="pass", plural="passes", built_in=BUILT_IN, check=_check, reserved=COMMANDS)
