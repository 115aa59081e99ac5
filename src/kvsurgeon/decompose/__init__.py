"""Fused operators written in standard ones.

Fused operators embed, normalise, project, rotate and mask in one node. Decomposed, they consist of the operators that
any other model consists of, so no other stage has to know them.
Source of their semantics: onnxruntime, docs/ContribOperators.md and its CPU kernels.
"""

from kvsurgeon.decompose.model import RULES, DecomposedModel, decompose

__all__ = ["RULES", "DecomposedModel", "decompose"]
