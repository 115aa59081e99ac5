"""Fused operators of com.microsoft, written out in standard ones.

They embed and norm, or project, split heads, turn, mask and multiply in one node, with a dozen inputs that change what
they mean. Written out they are what any other model is made of, and nothing else has to know them.
Source of what they compute: onnxruntime, docs/ContribOperators.md and its CPU kernels.
"""

from kvsurgeon.sequence.written_out.whole import RULES, WrittenOut, in_standard_operators

__all__ = ["RULES", "WrittenOut", "in_standard_operators"]
