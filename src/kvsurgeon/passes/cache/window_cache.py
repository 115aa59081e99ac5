"""Keep the rows of a window in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from kvsurgeon.anatomy import Mask
from kvsurgeon.cache.pairs import find_cache_pairs
from kvsurgeon.cache.sizes import cache_size
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.fusion.windowed_operators import drop_rows, operators_with_windows
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.cache.remove_cache import detach_cache, reattach_cache
from kvsurgeon.passes.contract import CACHE_TOKENS, Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count
from kvsurgeon.resizing.windows import Window, limit_attention


@dataclass(frozen=True, kw_only=True)
class WindowCache:
    """Keep only the rows of a window in the cache of layers with a sliding window, or of all layers.

    Before: `past_key_values.{i}.key [batch_size, kv_heads, past_sequence_length, head_dim]` of every layer. After:
    those of layers with a window of W have at most W rows, `last_W_rows`: each call drops the oldest ones. The model
    computes the same, also beyond the window. Of a static cache, `GroupQueryAttention` drops them from its buffers, if
    it computes the window.

    With `window`, the other layers get a window too: their queries attend to the last `window` tokens, their own
    included, and to the first `sinks` tokens of the text. Positions do not change. This is not exact: the report states
    the accuracy loss.

    Not supported: other caches than these, masks that depend on more than distances and padding, a cache before
    the rotary embedding.

    Attributes:
        window: Number of last tokens that layers without a sliding window attend to; none for all tokens.
        sinks: Number of first tokens that these layers attend to as well.
    """

    name: ClassVar[str] = "window-cache"
    exact: ClassVar[bool] = False  # its command measures the accuracy loss

    window: int | None = None
    sinks: int = 4

    def apply(self, subject: Subject) -> Outcome:
        """Drop the rows that no query reads any more from the cache of `subject.model`.

        Raises:
            UnsupportedError: The cache cannot be removed and injected again in this form, or a layer cannot be limited
                to a window; the model is unchanged.
        """
        if self.window is not None:
            check_count("window", self.window)
            check_count("sinks", self.sinks, least=0)
        pairs = find_cache_pairs(subject.model.graph)
        windowed = next((pair.past for pair in pairs if pair.window is not None), None)
        if windowed is not None:
            return Unchanged(reason=f"`{windowed.name}` holds the last rows already")
        operators = operators_with_windows(pairs)
        if operators and self.window is None:
            return Changed(edits=drop_rows(subject.model, operators))
        work = subject.with_model(subject.model)
        signature = detach_cache(work)
        if signature is None:
            return Unchanged(reason="the model has no cache: use inject")
        masks = [attention.mask for attention in work.decoder().attentions]
        windows = {
            index: Window(last=mask.window)
            for index, mask in enumerate(masks)
            if mask.kind == "sliding-window" and mask.window is not None and not mask.bias
        }
        others = {} if self.window is None else self._windows_of_others(masks)
        if not windows and not others:
            return Unchanged(reason="no layer has a sliding window")
        modes = ("dynamic", "last-rows", "recurrent")  # the latter two of states
        other = next((one for one in signature.entries if one.cache_mode not in modes), None)
        if other is not None:
            raise UnsupportedError(
                "rows can be dropped of a dynamic cache only", code=Code.PASS_PRECONDITION,
                at=other.past, expected="dynamic", found=other.cache_mode,
                hint="retarget changes it; or run fuse-attention with padding=lengths first",
            )  # fmt: skip
        analysis = work.analysis_of_copy(keep_attention=False)
        if others:
            with deep_recursion():
                limit_attention(analysis, others)
            work.changed()
        limited = copy_model(work.model) if others else None
        outcome = reattach_cache(work, signature, windows={**windows, **others})
        if limited is not None:
            before, after = (cache_size(model.graph).of(CACHE_TOKENS) for model in (subject.model, work.model))
            pair = limited, copy_model(work.model)
            outcome = replace(
                outcome, exact=False, proof=None, equal_models=lambda: [pair], cache_bytes=(before, after)
            )
        subject.model = work.model
        return outcome

    def _windows_of_others(self, masks: Sequence[Mask]) -> Mapping[int, Window]:
        """Return the windows of layers without one, by the index of the attention site.

        Raises:
            UnsupportedError: A layer has a mask that depends on more than the order of tokens.
        """
        assert self.window is not None
        for layer, mask in enumerate(masks):
            if mask.kind not in ("causal", "sliding-window") or mask.bias or mask.block:
                raise UnsupportedError(
                    "attention cannot be limited to a window", code=Code.PASS_PRECONDITION, layer=layer,
                    expected="a causal mask or that of a window",
                    found=f"a mask of kind {mask.kind}" + (" with a bias" if mask.bias else ""),
                )  # fmt: skip
        window = Window(last=self.window, first=self.sinks)
        return {index: window for index, mask in enumerate(masks) if mask.kind == "causal"}
