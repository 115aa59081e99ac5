"""The contract of passes: the model that they change, their outcome, and their interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.anatomy import CachedTensor, Decoder, cache_facts, decoder_facts
from kvsurgeon.decompose import DecomposedModel, decompose, decompose_attention
from kvsurgeon.errors import UsageError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.io.gc_pause import gc_paused
from kvsurgeon.io.json_files import read_json
from kvsurgeon.io.loading import Source
from kvsurgeon.io.model_config import HeadChange
from kvsurgeon.proof.cancelled_numbers import without_cancelled_numbers
from kvsurgeon.proof.constant_prefix import with_constant_prefix
from kvsurgeon.proof.key_counts import with_checked_key_counts
from kvsurgeon.proof.proof import Proof, prove
from kvsurgeon.rewrite.cache_removal import RemovedCache, remove_cache

if TYPE_CHECKING:
    from kvsurgeon.parity.report import Progress  # onnxruntime is slow to import

CACHE_TOKENS = 4096  # of the sequence whose cache is stated in bytes


@dataclass(kw_only=True)
class Subject:
    """The model that a pass changes, and the results of the stages for its graph.

    Each stage runs once for a graph: its result is kept until `changed()` is called or `model` is replaced.

    Attributes:
        model: The model as it is now.
        folder: The folder of the model, its weights and its side files.
        config: The parsed `config.json` of the folder; None if there is none. No pass requires it.
        text: A text file, on whose first half passes are calibrated; the second half measures their loss.
        progress: Called before each step of a pass that takes minutes.
    """

    model: ir.Model
    folder: Path | None = None
    config: dict[str, Any] | None = None
    text: Path | None = None
    progress: Progress | None = field(default=None, repr=False)
    _stages: _Stages | None = field(default=None, repr=False)

    @classmethod
    def of(cls, source: Subject | Source, folder: str | Path | None = None) -> Subject:
        """Return a subject for a file, a folder that holds one, or a model in memory.

        Args:
            source: The model. An `ir.Model` is changed in place, other models are not. A subject is returned as is.
            folder: The folder of the external data and the config of a model in memory.

        Raises:
            UsageError: The source is of another type.
            InputError: The model cannot be read.
        """
        if isinstance(source, Subject):
            return source
        model = io.load(source, folder=folder)
        path = io.loaded_from(model)
        if folder is None and path is not None:
            folder = path.parent
        here = None if folder is None else Path(folder)
        return cls(model=model, folder=here, config=None if here is None else _config(here))

    def decomposed(self) -> DecomposedModel:
        """Return the model in standard operators.

        Raises:
            UnsupportedError: A fused operator cannot be decomposed.
        """
        return self._current().decomposed

    def analysis(self) -> Analysis:
        """Return the analysis of the decomposed model, whose nodes and values it refers to.

        Raises:
            UnsupportedError: The model is not a decoder without a cache.
        """
        return self._current().analysis

    def analysis_of_copy(self, *, keep_attention: bool = True) -> Analysis:
        """Replace the model by a copy in standard operators, and return its analysis, which refers to that copy.

        A pass edits the graph of the analysis, then calls `changed()`.

        Args:
            keep_attention: Whether `Attention` of ONNX may stay.

        Raises:
            UnsupportedError: The model is not a decoder without a cache.
        """
        stages = _Stages(copy_model(self.model))
        self.model = stages.model = stages.decomposed.model
        if not keep_attention:
            decompose_attention(self.model)
        self._stages = stages
        return self.analysis()

    def proof(self) -> Proof:
        """Return the proof that the decomposed model is causal and prefix-stable.

        Raises:
            UnsupportedError: It is not, or the model is not a decoder without a cache.
        """
        return self._current().proof

    def decoder(self) -> Decoder:
        """Return the facts about the decoder; about one with a cache, those of its first call.

        Raises:
            UnsupportedError: The model is not a causal decoder that can be handled soundly.
        """
        return self._current().decoder

    def cache(self) -> tuple[CachedTensor, ...]:
        """Return the facts about the cache that the model has; nothing is run to find them.

        Raises:
            UnsupportedError: It cannot be read.
        """
        return self._current().cache

    def with_model(self, model: ir.Model) -> Subject:
        """Return a subject for another model, with the files of this one."""
        return replace(self, model=model, _stages=None)

    def text_for(self, purpose: str) -> Path:
        """Return the text to calibrate on.

        Raises:
            UsageError: There is none.
        """
        if self.text is None:
            raise UsageError(f"expected a text {purpose}, found none; give --text FILE")
        return self.text

    def changed(self) -> None:
        """Discard the results of the stages, because the graph was edited."""
        self._stages = None

    def become(self, other: Subject) -> None:
        """Take the model of another subject, and the results of its stages."""
        self.model, self._stages = other.model, other._stages

    def _current(self) -> _Stages:
        if self._stages is None or self._stages.model is not self.model:
            self._stages = _Stages(self.model)
        return self._stages


class _Stages:
    """The results of the stages for one graph; each is computed on first use."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    @cached_property
    def decomposed(self) -> DecomposedModel:
        with deep_recursion(), gc_paused():
            return with_constant_prefix(with_checked_key_counts(decompose(self.model)))

    @cached_property
    def analysis(self) -> Analysis:
        with deep_recursion(), gc_paused():
            found = analyze(self.decomposed.model)
        if self.decomposed.longest is not None:
            found.shapes.bounds.add(self.decomposed.longest)
        return found

    @cached_property
    def proof(self) -> Proof:
        with deep_recursion():
            return prove(self.analysis, self.decomposed)

    @cached_property
    def removed(self) -> tuple[RemovedCache, _Stages] | None:
        """The model without its cache, with its stages; None if it has none."""
        with deep_recursion(), gc_paused():
            removed = remove_cache(self.model)
        return None if removed is None else (removed, _Stages(removed.model))

    @cached_property
    def cache(self) -> tuple[CachedTensor, ...]:
        if self.removed is None:
            return ()
        removed, without_cache = self.removed
        return tuple(cache_facts(removed.signature.located(without_cache.analysis)))

    @cached_property
    def decoder(self) -> Decoder:
        if self.removed is not None:
            return replace(self.removed[1].decoder, cache=self.cache)
        with deep_recursion():
            analysis = without_cancelled_numbers(self.analysis)
            proof = self.proof if analysis is self.analysis else prove(analysis, self.decomposed)
            return decoder_facts(analysis, proof)


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A second model, whose outputs are inputs of the model that a pass changed.

    Attributes:
        model: The second model.
        connections: For each of its outputs, the input that takes it in every call. Empty if the second model is a part
            of the model, which computes the same without it.
    """

    model: ir.Model
    connections: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Changed:
    """The pass changed the model.

    Attributes:
        edits: Number of nodes added, removed or changed.
        notes: Notes for the user, such as assumptions without proof.
        exact: Whether the pass preserves the results of the model; if not, the loss is measured instead.
        heads: Head counts before and after, for `config.json`; None if they did not change.
        equal_models: Returns pairs of models that must compute the same, to verify a pass that is not exact, such as
            the graph before with the weights after, and the graph after, both without a cache. The second one of the
            last pair computes what the result does. None if there are no pairs.
        cache_bytes: Bytes of the cache of a sequence of `CACHE_TOKENS` tokens before and after; None if not known.
        proof: What the pass rests on, without the attention patterns; None if it adds no cache.
        companions: Models that compute inputs of the result, by the name of their file in its folder.
        original: The model to which the loss of the result is measured; None for the model before the first pass.
        renamed: New names of inputs and outputs by their old ones, under which the verifier compares them.
    """

    edits: int
    notes: tuple[str, ...] = ()
    exact: bool = True
    heads: HeadChange | None = None
    cache_bytes: tuple[int, int] | None = None
    equal_models: Callable[[], Sequence[tuple[ir.Model, ir.Model]]] | None = field(
        default=None, repr=False, compare=False
    )
    proof: Proof | None = field(default=None, repr=False, compare=False)
    companions: Mapping[str, Companion] = field(default_factory=dict, repr=False, compare=False)
    original: Path | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Unchanged:
    """The pass did not change the model.

    Attributes:
        reason: Why there was nothing to change.
    """

    reason: str


Outcome = Changed | Unchanged


def _config(folder: Path) -> dict[str, Any] | None:
    """Return the contents of `config.json`; None if there is none, or another kind of text."""
    path = folder / "config.json"
    try:
        config = read_json(path) if path.exists() else None
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


@runtime_checkable
class Pass(Protocol):
    """A pass: a frozen dataclass whose fields are its options, in Python and as `name{option=value}`.

    The model is valid before and after the pass. A pass that does not support the model raises `UnsupportedError`
    before its first edit. A pass that does not preserve the results declares `exact: ClassVar[bool] = False`; its
    command then has options for measuring the loss.
    """

    name: ClassVar[str]  # in kebab-case, as in `kvsurgeon run -p NAME`

    def apply(self, subject: Subject) -> Outcome:
        """Change `subject.model`, or return why there was nothing to change."""
        ...
