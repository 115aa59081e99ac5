"""The face that users of SparseML know: `KeyValueCacheInjector(model_path).apply(model)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx

from kvsurgeon import io
from kvsurgeon.anatomy import Decoder
from kvsurgeon.errors import UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

_DECIDED_BY_THE_GRAPH = frozenset({"transpose_value_input", "transpose_key_input", "multiply_batch_by_num_att_heads"})


class KeyValueCacheInjector:
    """Give a decoder past inputs and present outputs, by what its graph computes.

    Args:
        model_path: The model's folder or file: where its external data lies. None where the proto holds everything, or
            was loaded with `load_external_data=False` and is saved beside its data again.
        inplace: Whether `apply` changes the proto that it is given, as well as returning it.
        num_attention_heads: If given, checked: query or kv heads that every layer must turn out to have.
        hidden_size_kv_cache: If given, checked: features of one head that the cache must turn out to hold.
        additional_transforms: Passes or functions of your own, run after the injection.

    Raises:
        UsageError: An override is unknown, or asks for what the graph decides.
    """

    supported_models: ClassVar[str] = (
        "Any causal decoder from any exporter: attention is found by what the graph computes, never by a model's type "
        "or by names. What cannot be handled soundly is refused, with the layer and the reason."
    )

    def __init__(
        self,
        model_path: str | Path | None = None,
        inplace: bool = True,
        *,
        num_attention_heads: int | None = None,
        hidden_size_kv_cache: int | None = None,
        additional_transforms: Callable[..., Any] | Sequence[Callable[..., Any]] = (),
        **overrides: Any,
    ) -> None:
        for name in overrides:
            raise UsageError(_unknown(name))
        path = None if model_path is None else Path(model_path)
        self.folder = path.parent if path is not None and path.is_file() else path
        self.inplace = inplace
        self.num_attention_heads = num_attention_heads
        self.hidden_size_kv_cache = hidden_size_kv_cache
        transforms = additional_transforms if isinstance(additional_transforms, Sequence) else (additional_transforms,)
        self.additional_transforms = tuple(transforms)

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the model with a cache; external data stays where it is and is not read.

        Raises:
            InputError: The model or its external data is not whole.
            UnsupportedError: The model cannot be given a cache soundly; it is as it was.
            UsageError: An override does not agree with the graph; the model is as it was.
        """
        from kvsurgeon.workflow.pipeline import Pipeline

        subject = Subject.of(model, self.folder)
        if self.num_attention_heads is not None or self.hidden_size_kv_cache is not None:
            self._check(subject.decoder())
        result = Pipeline((Inject(), *self.additional_transforms)).run(subject.model, folder=self.folder)
        injected = io.to_proto(result.model)
        if not self.inplace:
            return injected
        model.CopyFrom(injected)
        return model

    def export(self, model: onnx.ModelProto, file_path: str | Path) -> Path:
        """Apply, and save to a file: external data and side files of the model's folder travel along.

        Returns:
            The file that was written.
        """
        loaded = io.load(self.apply(model), folder=self.folder)
        return io.save(loaded, file_path, source=self.folder)

    def _check(self, decoder: Decoder) -> None:
        for attention in decoder.attentions:
            heads = (attention.query_heads, attention.kv_heads)
            if self.num_attention_heads not in (None, *heads):
                raise UsageError(
                    f"layer {attention.layer}: expected {self.num_attention_heads} heads as num_attention_heads says, "
                    f"found {heads[0]} query and {heads[1]} kv heads in the graph; leave num_attention_heads out"
                )
            if self.hidden_size_kv_cache not in (None, attention.key_cache.head_dim):
                raise UsageError(
                    f"layer {attention.layer}: expected {self.hidden_size_kv_cache} features of a head as "
                    f"hidden_size_kv_cache says, found {attention.key_cache.head_dim} in the graph; leave it out"
                )


def _unknown(name: str) -> str:
    if name in _DECIDED_BY_THE_GRAPH:
        return f"`{name}` is decided by the graph: caches are [batch, kv_heads, sequence, head_dim]; leave it out"
    return (
        f"unknown override `{name}`: expected num_attention_heads, hidden_size_kv_cache or additional_transforms; what "
        "else a config says is read off the graph"
    )
