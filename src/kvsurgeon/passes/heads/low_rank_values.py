"""Replace the values of all heads by one latent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.heads.change_heads import bytes_of_cache
from kvsurgeon.passes.options import check_count

if TYPE_CHECKING:
    from kvsurgeon.calibration.low_rank import LowRankMap


@dataclass(frozen=True, kw_only=True)
class LowRankValues:
    """Replace the values of all KV heads by one latent of lower rank, which makes the cache of values smaller.

    Before: values of `kv_heads * head_dim` features. After: a latent of `rank` features, which each query head reads,
    and an output projection of `query_heads * rank` rows. The latent holds the principal components of the values on a
    text (`--text FILE`), as the output projection reads them. Keys are unchanged. Not exact: the report states the
    accuracy loss.

    Not supported: quantized weights, values with a norm.

    Attributes:
        rank: Features of the latent.
    """

    name: ClassVar[str] = "low-rank-values"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    rank: int

    def apply(self, subject: Subject) -> Outcome:
        """Replace the values of every layer that has more features than the latent.

        Raises:
            UsageError: There is no text.
            UnsupportedError: The weights of values cannot be found, or they cannot be read as one latent.
        """
        check_count("rank", self.rank)
        text = subject.text_for("to find principal components on")
        from kvsurgeon.calibration import compute_latents, fit_latents  # onnxruntime is slow to import

        work = subject.with_model(subject.model)
        signature = detach_cache(work)
        analysis = work.analysis_of_copy(keep_attention=False)
        before = copy_model(work.model)
        with deep_recursion():
            size = bytes_of_cache(analysis, signature)
            maps = fit_latents(analysis, self.rank, text, subject.folder)
            if not any(maps):
                return Unchanged(reason=f"no layer has values of more than {self.rank} features")
            edits = compute_latents(analysis, maps)
        work.changed()
        sizes = size, bytes_of_cache(work.analysis(), signature)
        equal = partial(_equal_models, before, copy_model(work.model), maps)
        if signature is not None:
            reattach_cache(work, signature)
        subject.model = work.model
        return Changed(edits=edits, exact=False, equal_models=equal, cache_bytes=sizes)


def _equal_models(before: ir.Model, after: ir.Model, maps: list[LowRankMap | None]) -> list[tuple[ir.Model, ir.Model]]:
    """Return the model before with values of lower rank in an unchanged graph, and the model after."""
    from kvsurgeon.calibration import project_values  # onnxruntime is slow to import

    work = Subject(model=before)
    with deep_recursion():
        project_values(work.analysis_of_copy(), maps)
    return [(work.model, after)]
