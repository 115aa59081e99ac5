"""Replace operators by those that a runtime has fast kernels for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvsurgeon.passes.contract import Changed, Outcome, Pass, Subject, Unchanged
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.passes.operators.fuse_skip_norms import FuseSkipNorms
from kvsurgeon.passes.operators.pack_projections import PackProjections
from kvsurgeon.passes.operators.reciprocal_to_div import ReciprocalToDiv
from kvsurgeon.passes.operators.store_transposed_weights import StoreTransposedWeights
from kvsurgeon.passes.options import check_count


@dataclass(frozen=True, kw_only=True)
class Optimize:
    """Replace operators by those that onnxruntime has fast CPU kernels for: one pass for all of them.

    Before: a decoder with a cache. After: `fuse-attention`, `fuse-skip-norms`, `reciprocal-to-div`, `pack-projections`
    and `store-transposed-weights`, where each applies. Layers that `GroupQueryAttention` does not support stay.

    Attributes:
        runtime: Runtime and processor that the operators are for.
        layers: Attention layers to fuse: all of them, or only those that the operator supports.
        padding: See fuse-attention.
        max_length: See fuse-attention.
    """

    name: ClassVar[str] = "optimize"

    runtime: Literal["onnxruntime-cpu"] = "onnxruntime-cpu"
    layers: Literal["all", "supported"] = "supported"
    padding: Literal["mask", "lengths"] = "mask"
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_count("max-length", self.max_length)

    def apply(self, subject: Subject) -> Outcome:
        """Optimize `subject.model`.

        Raises:
            UnsupportedError: The operators support no layer, or not all of them; the model is unchanged.
        """
        attention = FuseAttention(layers=self.layers, padding=self.padding, max_length=self.max_length)
        passes: tuple[Pass, ...] = (
            attention, FuseSkipNorms(), ReciprocalToDiv(), PackProjections(), StoreTransposedWeights(),
        )  # fmt: skip
        edits = 0
        notes: list[str] = []
        for one in passes:
            outcome = one.apply(subject)
            if isinstance(outcome, Changed):
                subject.changed()
                edits += outcome.edits
                notes.extend(outcome.notes)
        return Changed(edits=edits, notes=tuple(notes)) if edits else Unchanged(reason="every operator is optimal")
