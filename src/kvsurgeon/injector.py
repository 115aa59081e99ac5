"""`KeyValueCacheInjector(model_path).apply(model)`, with the interface of SparseML."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx

from kvsurgeon import io
from kvsurgeon.anatomy import Decoder
from kvsurgeon.errors import InputError, UsageError, did_you_mean
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

if TYPE_CHECKING:
    from kvsurgeon.workflow.pipeline import PipelineRun

_READ_FROM_THE_GRAPH = frozenset({"transpose_value_input", "transpose_key_input", "multiply_batch_by_num_att_heads"})
_MISREAD = (
    "DeepSparse loads this model and gives other tokens, or ends the process: KeyValueCacheInjector(..., "
    "target='deepsparse') builds the form that it needs; other runtimes are not affected"
)


class KeyValueCacheInjector:
    """Inject a KV cache into a decoder; attention is found by what the graph computes.

    Args:
        model_path: The folder or file of the model; its external data is in the same folder. None if the proto contains
            all weights, or was loaded with `load_external_data=False` and will be saved in the folder of its data.
        inplace: Whether `apply` changes the proto that it is given, and returns it.
        num_attention_heads: Expected number of query heads or KV heads of each layer; None to accept any.
        hidden_size_kv_cache: Expected head dimension of the cache; None to accept any. `hidden_size_dim` is the same.
        additional_transforms: Passes or functions to run after the injection.
        target: Name of the runtime or compiler that loads the result, such as "deepsparse"; None for others.
        **overrides: Other arguments of SparseML: the graph has what they state, which is a note of the results.

    Raises:
        UsageError: An override is unknown, or excludes another.
        InputError: There is nothing at `model_path`.
    """

    supported_models: ClassVar[str] = (
        "Any causal decoder from any exporter: attention is found by what the graph computes, not by model type or "
        "names. Models that cannot be handled soundly are rejected, with the layer and the reason."
    )

    def __init__(
        self,
        model_path: str | Path | None = None,
        inplace: bool = True,
        *,
        num_attention_heads: int | None = None,
        hidden_size_kv_cache: int | None = None,
        additional_transforms: Callable[..., Any] | Sequence[Callable[..., Any]] = (),
        target: str | None = None,
        **overrides: Any,
    ) -> None:
        if "hidden_size_dim" in overrides:  # as the docstring of SparseML calls it
            hidden_size_kv_cache = overrides.pop("hidden_size_dim")
        self.notes = tuple(_note_of_override(name) for name in overrides)
        if target is not None and additional_transforms:
            raise UsageError("expected a target or additional_transforms, found both; run kvsurgeon.run on the result")
        path = None if model_path is None else Path(model_path)
        if path is not None and not path.exists():
            raise InputError(f"expected the file or the folder of a model, found nothing at `{path}`; check the path")
        self.folder = path.parent if path is not None and path.is_file() else path
        self.inplace = inplace
        self.num_attention_heads = num_attention_heads
        self.hidden_size_kv_cache = hidden_size_kv_cache
        transforms = additional_transforms if isinstance(additional_transforms, Sequence) else (additional_transforms,)
        self.additional_transforms = tuple(transforms)
        self.target = target

    def apply(self, model: onnx.ModelProto | str | Path, *, verify: bool = False) -> onnx.ModelProto:
        """Return the model with a cache; its external data is not moved.

        Notes, such as what is assumed and not proved, are issued as warnings. So is one if DeepSparse would load the
        result without a target, and give other tokens.

        Args:
            model: The model without a cache, or the path of one, of which all weights are loaded.
            verify: Whether to run the result and the original on the same texts, which needs the weights; without it,
                external data is not read.

        Raises:
            InputError: The model or its external data is incomplete.
            UnsupportedError: The model cannot be handled soundly; it is unchanged.
            UsageError: The graph has other sizes than the overrides expect; the model is unchanged.
            ParityError: The results of the model differ from those of the original; the model is unchanged.
        """
        given = model if isinstance(model, onnx.ModelProto) else _with_weights(model)
        injected = self._run(Subject.of(given, self.folder), verify=verify).to_proto()
        if not self.inplace:
            return injected
        given.CopyFrom(injected)
        return given

    def export(self, model: onnx.ModelProto | str | Path, file_path: str | Path) -> Path:
        """Inject the cache, and save the model with external data and side files; return the file.

        Args:
            model: The model without a cache, or its path.
            file_path: The file; for a target its folder, or the model's file in it.
        """
        subject = Subject.of(model, self.folder)
        if self.target is not None:
            return Path(self._run(subject, destination=file_path).path or file_path)
        return self._run(subject).save(file_path, source=self.folder)

    def _run(self, subject: Subject, *, verify: bool = False, destination: str | Path | None = None) -> PipelineRun:
        from kvsurgeon.targets.deepsparse import is_misread
        from kvsurgeon.workflow.build_target import build_target
        from kvsurgeon.workflow.pipeline import Pipeline
        from kvsurgeon.workflow.run_and_save import run_and_save

        if self.num_attention_heads is not None or self.hidden_size_kv_cache is not None:
            self._check(subject.decoder())
        if self.target is not None:
            result: PipelineRun = build_target(subject, self.target, destination, verify=verify)
        else:
            result = run_and_save(subject, Pipeline((Inject(), *self.additional_transforms)), verify=verify)
        misread = (_MISREAD,) if self.target is None and is_misread(result.model) else ()
        for note in (*self.notes, *result.notes, *misread):
            warnings.warn(note, stacklevel=3)
        return result

    def _check(self, decoder: Decoder) -> None:
        for attention in decoder.attentions:
            heads = (attention.query_heads, attention.kv_heads)
            if self.num_attention_heads not in (None, *heads):
                raise UsageError(
                    f"layer {attention.layer}: expected {self.num_attention_heads} heads (num_attention_heads), "
                    f"found {heads[0]} query heads and {heads[1]} KV heads in the graph; omit num_attention_heads"
                )
            if self.hidden_size_kv_cache not in (None, attention.key_cache.head_dim):
                raise UsageError(
                    f"layer {attention.layer}: expected head_dim {self.hidden_size_kv_cache} (hidden_size_kv_cache), "
                    f"found {attention.key_cache.head_dim} in the graph; omit hidden_size_kv_cache"
                )


def _note_of_override(name: str) -> str:
    if name not in _READ_FROM_THE_GRAPH:
        known = ("num_attention_heads", "hidden_size_kv_cache", "hidden_size_dim", "additional_transforms", "target")
        raise UsageError(f"unknown override `{name}`; {did_you_mean(name, known)}")
    return f"`{name}` is read from the graph; caches are [batch, kv_heads, sequence, head_dim]; omit it"


def _with_weights(path: str | Path) -> onnx.ModelProto:
    """Return the model at a path, with its external data."""
    model = io.load(path)
    proto = io.to_proto(model)
    onnx.load_external_data_for_model(proto, str(io.find_model(path).parent))
    return proto
