"""Fused attention of com.microsoft, written out in standard operators.

These operators project, split heads, mask and multiply in one node, with a dozen inputs that change what they mean.
Written out they are the same products as any other attention, and nothing else has to know them.
Source of what they compute: onnxruntime, docs/ContribOperators.md and its CPU kernels.
"""

from kvsurgeon.sequence.written_out.whole import WrittenOut, in_standard_operators

__all__ = ["WrittenOut", "in_standard_operators"]
