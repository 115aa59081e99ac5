"""What a pass is: something with a name and options that changes a model, or says why it did not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import onnx
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.anatomy import Decoder, cache_facts, decoder_facts
from kvsurgeon.decompose import DecomposedModel, decompose
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.io.model_config import HeadChange
from kvsurgeon.proof.proof import Proof, prove
from kvsurgeon.rewrite.cache_removal import remove_cache

Source = str | Path | onnx.ModelProto | ir.Model


@dataclass(kw_only=True)
class Subject:
    """The model that a pass changes, and the results of the stages for its graph.

    Each stage runs once for a graph: its result is kept until `changed()` is called or `model` is replaced.

    Attributes:
        model: The model as it is now.
        folder: The folder of the model, its weights and its side files.
        config: The parsed `config.json` of the folder; None if there is none. No pass requires it.
    """

    model: ir.Model
    folder: Path | None = None
    config: dict[str, Any] | None = None
    _stages: _Stages = field(default_factory=lambda: _Stages(), repr=False)

    @classmethod
    def of(cls, source: Subject | Source, folder: str | Path | None = None) -> Subject:
        """Return a subject for a file, a folder that holds one, a proto or a model in memory.

        Args:
            source: The model. A proto is not changed; an `ir.Model` is changed in place. A subject is returned as is.
            folder: The folder of the external data and the config of a model in memory.

        Raises:
            InputError: The model cannot be read.
        """
        if isinstance(source, Subject):
            return source
        model = source if isinstance(source, ir.Model) else io.load(source, folder=folder)
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
        stages = self._current()
        if stages.decomposed is None:
            stages.decomposed = decompose(self.model)
        return stages.decomposed

    def analysis(self) -> Analysis:
        """Return the analysis of the decomposed model; its values and nodes are those of `decomposed().model`.

        Raises:
            UnsupportedError: The model is not a decoder without a cache.
        """
        decomposed, stages = self.decomposed(), self._current()
        if stages.analysis is None:
            with deep_recursion():
                stages.analysis = analyze(decomposed.model)
        return stages.analysis

    def proof(self) -> Proof:
        """Return the proof that the model is causal and prefix-stable.

        Raises:
            UnsupportedError: It is not, or the model is not a decoder without a cache.
        """
        analysis, stages = self.analysis(), self._current()
        if stages.proof is None:
            with deep_recursion():
                stages.proof = prove(analysis, self.decomposed().assumed)
        return stages.proof

    def decoder(self) -> Decoder:
        """Return the facts of the decoder; of one with a cache, those of its first call.

        Raises:
            UnsupportedError: The model is not a causal decoder that can be handled soundly.
        """
        stages = self._current()
        if stages.decoder is None:
            stages.decoder = self._describe()
        return stages.decoder

    def changed(self) -> None:
        """Discard the results of the stages: the graph was edited."""
        self._stages = _Stages()

    def become(self, other: Subject) -> None:
        """Take the model of another subject, and the results of its stages."""
        self.model, self._stages = other.model, other._stages

    def _current(self) -> _Stages:
        if self._stages.model is not self.model:
            self._stages = _Stages(model=self.model)
        return self._stages

    def _describe(self) -> Decoder:
        with deep_recursion():
            removed = remove_cache(self.model)
            if removed is None:
                return decoder_facts(self.analysis(), self.proof())
            without_cache = Subject(model=removed.model)
            decoder = without_cache.decoder()
            signature = removed.signature.located(without_cache.analysis())
            return replace(decoder, cache=tuple(cache_facts(signature)))


@dataclass(kw_only=True)
class _Stages:
    """The results of the stages for one graph, as far as they have run."""

    model: ir.Model | None = None
    decomposed: DecomposedModel | None = None
    analysis: Analysis | None = None
    proof: Proof | None = None
    decoder: Decoder | None = None


@dataclass(frozen=True, kw_only=True)
class Changed:
    """The model was changed."""

    edits: int  # nodes added, removed or altered
    notes: tuple[str, ...] = ()  # what a reader should know: what was assumed, what could not be proved
    exact: bool = True  # whether the model computes what it did: else the judge says how much was lost
    heads: HeadChange | None = None  # head counts before and after, for `config.json`


@dataclass(frozen=True, kw_only=True)
class Unchanged:
    """The model was left exactly as it was."""

    reason: str


Outcome = Changed | Unchanged


def _config(folder: Path) -> dict[str, Any] | None:
    """Return the folder's config.json if there is one that can be read: no pass may depend on it."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


@runtime_checkable
class Pass(Protocol):
    """A pass: a frozen dataclass whose fields are its options, in Python and as `name{option=value}`.

    The model is valid before and must be valid after. A pass that cannot do its work soundly raises `UnsupportedError`
    before its first edit.

    One that is not to compute the same says so with `exact: ClassVar[bool] = False`: its command then takes the text
    on which to measure what is lost.
    """

    name: ClassVar[str]  # as in `kvsurgeon run -p NAME`, in kebab-case

    def apply(self, subject: Subject) -> Outcome:
        """Change `subject.model` in place, or say why not."""
        ...
