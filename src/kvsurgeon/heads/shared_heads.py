"""Where query heads and key heads meet: the axes of the operand of a product that keys or values meet, cut up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.heads.repetition import way_of
from kvsurgeon.ops.contraction import Contraction
from kvsurgeon.ops.table import contraction_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, Dimension

Word = Literal["batch", "shared", "own", "tokens", "width"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of an axis: heads that keys have too (shared), or queries alone (own), or something else."""

    word: Word
    size: Dimension


def key_heads_read(analysis: Analysis, layer: int) -> tuple[int, ...]:
    """Return for each query head of a layer, in the order in which its product has them, the key head that it reads.

    Raises:
        UnsupportedError: Heads cannot be followed.
    """
    head, flow = analysis.heads[layer], analysis.flow
    counts = counts_of(flow, head)
    if counts.kv_heads == counts.heads:
        return tuple(range(counts.heads))
    way = way_of(flow, Labels(flow), layer, head, head.keys[0], counts)
    if way.sharing == "repeated":
        return tuple(way.heads.tolist())
    if way.sharing == "native":
        return tuple((np.arange(counts.heads) // (counts.heads // counts.kv_heads)).tolist())
    parts = [part for parts in parts_met(flow, way.operand.place) for part in parts if part.word in ("shared", "own")]
    sizes = [int(part.size) if part.word == "shared" else 1 for part in parts]
    numbered = np.arange(np.prod(sizes, dtype=int)).reshape(sizes)
    return tuple(np.broadcast_to(numbered, [int(part.size) for part in parts]).reshape(-1).tolist())


def contraction_at(flow: TokenFlow, node: ir.Node) -> Contraction:
    """Return the sum that a product is.

    Raises:
        UnsupportedError: It is one of more than two tensors.
    """
    found = contraction_of(flow.shapes.call(node))
    if found is None:
        raise UnsupportedError("a product of more than two tensors", at=node.outputs[0].name)
    return found


def parts_met(flow: TokenFlow, place: Place) -> list[list[Part]]:
    """Return the axes of the operand that meets the keys or values at `place`, each cut into what it holds.

    Raises:
        UnsupportedError: Heads cannot be told from what lies beside them.
    """
    node, index = place
    found = contraction_at(flow, node)
    left = index == found.right
    labels, theirs = (found.left_labels, found.right_labels) if left else (found.right_labels, found.left_labels)
    value, keys = node.inputs[found.left if left else found.right], node.inputs[index]
    assert value is not None
    assert keys is not None
    key_shape = flow.shapes[keys].shape or ()
    held = {axis.axis: axis for axis in flow.axes.get(value, ())}
    cut: list[list[Part]] = []
    for axis, (label, size) in enumerate(zip(labels, flow.shapes[value].shape or (), strict=True)):
        if label in found.summed:
            cut.append([Part(word="width", size=size)])
        elif axis in held:
            outer, inner = (_heads(one, "own", value) for one in (held[axis].outer, held[axis].inner))
            cut.append([*outer, Part(word="tokens", size=flow.length), *inner])
        elif axis == 0 and isinstance(flow.batch, int) and size == flow.batch:
            cut.append([Part(word="batch", size=size)])
        else:
            both = label in theirs and key_shape[theirs.index(label)] != 1
            cut.append(_heads(size, "shared" if both else "own", value))
    return cut


def _heads(size: Dimension, word: Word, value: ir.Value) -> list[Part]:
    """What beside tokens an axis holds: the batch, heads, both, or nothing."""
    if isinstance(size, int):
        return [] if size == 1 else [Part(word=word, size=size)]
    rest = dim.exact_quotient(size, BATCH)
    if not isinstance(rest, int):
        raise UnsupportedError("query heads cannot be told from what lies beside them", at=value.name, found=str(size))
    return [Part(word="batch", size=BATCH), *([] if rest == 1 else [Part(word=word, size=rest)])]
