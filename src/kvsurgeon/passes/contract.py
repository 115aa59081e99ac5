"""What a pass is: something with a name and options that changes a model, or says why it did not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import onnx
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.anatomy import Decoder, find_decoder
from kvsurgeon.io.model_config import Change

Source = str | Path | onnx.ModelProto | ir.Model


@dataclass(kw_only=True)
class Subject:
    """The model that a pass works on, and what is known of it."""

    model: ir.Model
    folder: Path | None = None  # where the model, its weights and its side files lie
    config: dict[str, Any] | None = None  # parsed config.json, where there is one; never needed
    _decoder: Decoder | None = field(default=None, repr=False)

    @classmethod
    def of(cls, source: Source, folder: str | Path | None = None) -> Subject:
        """Return a subject for a file, a folder that holds one, a proto or a model in memory.

        Args:
            source: Where the model is. A proto stays as it is; an `ir.Model` is the one that is worked on.
            folder: Where the external data and the config of a model in memory lie.

        Raises:
            InputError: The model cannot be read.
        """
        model = source if isinstance(source, ir.Model) else io.load(source, folder=folder)
        path = io.loaded_from(model)
        if folder is None and path is not None:
            folder = path.parent
        here = None if folder is None else Path(folder)
        return cls(model=model, folder=here, config=None if here is None else _config(here))

    def decoder(self) -> Decoder:
        """Return the anatomy of the model as it is now; analysed once, and again after `changed()`.

        Raises:
            UnsupportedError: The model is not a causal decoder that can be handled soundly.
        """
        if self._decoder is None:
            self._decoder = find_decoder(self.model)
        return self._decoder

    def changed(self) -> None:
        """Forget the anatomy: the graph is no longer the one it was found in."""
        self._decoder = None


@dataclass(frozen=True, kw_only=True)
class Changed:
    """The model was changed."""

    edits: int  # nodes added, removed or altered
    notes: tuple[str, ...] = ()  # what a reader should know: what was assumed, what could not be proved
    exact: bool = True  # whether the model computes what it did: else the judge says how much was lost
    heads: Change | None = None  # what became of the attention heads, for `config.json` to follow


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
