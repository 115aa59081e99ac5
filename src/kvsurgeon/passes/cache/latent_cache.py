"""Cache the latent of multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.heads.latents import Latent, find_latent, read_latents
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import CACHE_TOKENS, Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.heads.change_heads import bytes_of_cache


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """Cache the latent of multi-head latent attention (DeepSeek-V2, MiniCPM3) instead of the keys and values of heads.

    Before: keys and values of all heads are computed from a latent of fewer features, and all heads share the part of
    their keys that has a rotary embedding. After: `past_key_values.{i}.key [batch_size, 1, past_sequence_length,
    features]` holds the latent and this part. The weights from the latent to keys and values become weights of the
    queries and of the output. The model computes the same.

    A decode step reads fewer bytes and multiplies more numbers; a note states both.

    Not supported: keys or values with a bias, or whose heads share an axis.
    """

    name: ClassVar[str] = "latent-cache"

    def apply(self, subject: Subject) -> Outcome:
        """Read the latent in the attention of `subject.model`.

        Raises:
            UnsupportedError: Keys and values are computed from fewer features, but not as a linear map; the model is
                unchanged.
        """
        work = subject.with_model(subject.model)
        signature = detach_cache(work)
        analysis = work.analysis_of_copy(keep_attention=False)
        with deep_recursion():
            found = {index: find_latent(analysis.flow, site) for index, site in enumerate(analysis.sites)}
            latents = {index: latent for index, latent in found.items() if latent is not None}
            if not latents:
                return Unchanged(reason="no layer computes keys and values from fewer features")
            size = bytes_of_cache(analysis, signature)
            edits = read_latents(analysis, latents)
        work.changed()
        sizes = size, bytes_of_cache(work.analysis(), signature)
        if signature is not None:
            reattach_cache(work, signature)
        subject.model = work.model
        return Changed(edits=edits, cache_bytes=sizes, notes=(_note(next(iter(latents.values())), *sizes),))


def _note(latent: Latent, size: int, left: int) -> str:
    """Return what a decode step saves and costs."""
    heads, head_dim, _ = latent.keys.shape
    before, after = heads * (head_dim + latent.values.shape[2]), 2 * heads * latent.width
    return (
        f"a token has {left // CACHE_TOKENS:,} bytes instead of {size // CACHE_TOKENS:,}; a decode step multiplies "
        f"{after:,} numbers instead of {before:,} for it in a layer"
    )
