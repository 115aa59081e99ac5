"""Attention probe: the weights of one attention on probe inputs, and what must hold of them in every run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention.attention_weights import ReadWeights, weights_of_mask
from kvsurgeon.analysis.attention_sites import AttentionSite
from kvsurgeon.analysis.mask_patterns import MaskPattern, learned_rows_first, sequence_last, unmasked
from kvsurgeon.analysis.probe_inputs import Rows
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.proof.attention.attention_pattern import MIN_WEIGHT, largest_weight_on_later_key
from kvsurgeon.proof.length_sweep import LengthSweep, check_prefix_stable, first_tokens

SCALES = (30.0, 10.0, 3.0, 1.0)  # of the probed scores: a mask must hold for the largest that give finite weights
SCALES_OF_COMPARED = (100.0, 1000.0)  # of scores that are compared with numbers: any mask holds for them
_LARGE_INTEGER = 20.0  # which many probed integers exceed; they are at most 60


class AttentionProbe:
    """Computes the weights of one attention, and other reductions of its scores, on probe inputs.

    Args:
        sweep: The length sweep of the decoder.
        layer: Index of the attention layer, for messages.
        site: The attention.
        weights: The weights, and their zero point if they are quantized.
        read: Returns the weights from the computed arrays.
        reductions: Other values that are reduced from the scores over keys.
        learned: The weights if they have learned rows, which are compared like other reductions.
    """

    def __init__(
        self, sweep: LengthSweep, layer: int, site: AttentionSite, weights: Sequence[ir.Value], read: ReadWeights,
        *, reductions: Sequence[ir.Value] = (), learned: ir.Value | None = None,
    ) -> None:  # fmt: skip
        self.sweep = sweep
        self.layer = layer
        self.site = site
        self.runner = sweep.runner([*weights, *reductions], site if site.fused is None else None)
        self._read = read
        self._count = len(weights)
        axes = sweep.flow.axes
        self.axes = [axes.get(value, ()) for value in (*weights, *reductions)]
        if site.fused is not None:
            self.axes = [weights_of_mask(sweep.flow, site)[2]]
        self._learned_axes = () if learned is None else axes[learned]
        self.others = [(value, axes[value]) for value in reductions]  # compared in addition to the weights
        if learned is not None:
            self.others.append((learned, tuple(axis for axis in self._learned_axes if not axis.learned_rows)))
        if self.others and sweep.fixed is not None:
            raise UnsupportedError(
                "scores are reduced outside the attention weights, and a fixed length hides whether they are masked",
                code=Code.FIXED_LENGTH, layer=layer, at=self.others[0][0].name, hint="export with a dynamic length",
            )  # fmt: skip

    def run(self, length: int, mask: MaskPattern = unmasked, **options: Any) -> list[np.ndarray]:
        """Return the weights [..., query, key], then the other reductions; see `SubgraphRunner.run`."""
        return self.compared(self.runner.run(length, mask, **options), Rows.of_text(length))

    def compared(self, arrays: Sequence[np.ndarray], rows: Rows) -> list[np.ndarray]:
        """Return computed arrays as `run` does: the weights of these rows, then the other reductions."""
        weights, reduced = arrays[: self._count], arrays[self._count :]
        others = [sequence_last(array, axes, rows) for array, (_, axes) in zip(reduced, self.others, strict=False)]
        if self._learned_axes:
            others.append(learned_rows_first(arrays[0], self._learned_axes, rows))
        return [self._read(weights, rows), *others]

    def largest_scale(self, length: int) -> float:
        """Return the largest scale of the scores that gives finite weights."""
        if not self.runner.probed:
            return 1.0
        return next((scale for scale in SCALES if not np.isnan(self.run(length, scale=scale)[0]).any()), SCALES[-1])

    @cached_property
    def scales_of_compared(self) -> tuple[float, ...]:
        """Scales of scores that are compared with numbers, beyond which the scores are at one; () if none are."""
        nodes = [
            node
            for node in (self.site.upstream_of_weights if self.runner.probed else ())
            if has_trait(node, Trait.ORDER) and any(is_token(self.sweep.flow, value) for value in node.inputs)
        ]
        constants = [small_constant(value) for node in nodes for value in node.inputs]
        whole = {float(np.abs(one).max(initial=0)) for one in constants if one is not None and one.dtype.kind in "iu"}
        beyond = {number / _LARGE_INTEGER for number in whole}
        return (
            (*SCALES_OF_COMPARED, *sorted(scale for scale in beyond if scale > SCALES_OF_COMPARED[-1])) if nodes else ()
        )

    def check_causal(self, weights: np.ndarray, first_query: int = 0) -> None:
        """Check that no query gives weight to a later key.

        Raises:
            UnsupportedError: One does, or a weight is NaN.
        """
        if not weights.size:
            raise self.unsupported("attention has no weights", Code.INCONSISTENT_SHAPES, hint="a tensor of it is empty")
        weight, query, key = largest_weight_on_later_key(weights, first_query)
        if math.isnan(weight):
            hint = "a query without any unmasked key is a common cause"
            raise self.unsupported("attention weights are NaN", Code.NOT_CAUSAL, hint=hint)
        if weight > MIN_WEIGHT:
            raise not_causal(self.layer, self.site, f"query {query} attends to key {key} with weight {weight:.2g}")

    def check_stable(self, longer: np.ndarray, shorter: np.ndarray) -> None:
        """Check that weights are the same at two lengths.

        Raises:
            UnsupportedError: They differ.
        """
        check_prefix_stable("attention weights", longer, shorter, at=self.site.at, layer=self.layer)

    def check_lengths(self, outputs: Mapping[int, Sequence[np.ndarray]]) -> None:
        """Check that what `run` returns is causal and the same for a prefix at all of some lengths.

        Raises:
            UnsupportedError: It is not.
        """
        longest = outputs[max(outputs)]
        for weights, *_ in outputs.values():
            self.check_causal(weights)
        for length, (weights, *others) in outputs.items():
            self.check_stable(longest[0][..., :length, :length], weights)
            for (value, axes), longer, shorter in zip(self.others, longest[1:], others, strict=True):
                first = first_tokens(longer, axes, length)
                check_prefix_stable("reductions of attention scores", first, shorter, at=value, layer=self.layer)

    def unsupported(self, reason: str, code: Code, hint: str) -> UnsupportedError:
        """Return an error that names the layer and the output of the attention."""
        return UnsupportedError(reason, code=code, layer=self.layer, at=self.site.at.name, hint=hint)


def not_causal(layer: int, site: AttentionSite, found: str) -> UnsupportedError:
    """Return an error: attention is not causal."""
    return UnsupportedError(
        f"attention is not causal: {found}, so a KV cache would change the result", code=Code.NOT_CAUSAL,
        layer=layer, at=site.at.name, expected="no weight on keys after the query",
        hint="bidirectional models cannot use a KV cache; if a prefix or an image attends both ways, "
        "its mask must be an input, stated by --input NAME=first-call",
    )  # fmt: skip
