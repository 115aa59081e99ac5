"""Decompose fused operators, local functions and sequences into standard operators, so that no other stage knows them.

Source of the semantics: onnxruntime, docs/ContribOperators.md and its CPU kernels.
"""

from kvsurgeon.decompose.model import DecomposedModel, decompose, decompose_attention

__all__ = ["DecomposedModel", "decompose", "decompose_attention"]
