"""The description of a target, and the reasons why it cannot load a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Pass
from kvsurgeon.targets.model_info import ModelInfo, Operator

SideFileWriter = Callable[[ModelInfo], str | Mapping[str, Any] | None]
SEQUENCE = DEFAULT_LAYOUT.index("sequence")

# Models next to a decoder that compute inputs of it, as exporters call them.
ENCODER = "encoder_model.onnx"
EMBEDDING = "embed_tokens.onnx"
VISION = "vision_encoder.onnx"
EMBEDDINGS = "inputs_embeds"  # what the embedding returns and a decoder takes


@dataclass(frozen=True)
class Incompatibility:
    """A difference between a model and what a target expects.

    Attributes:
        reason: What was expected, and what was found.
        at: Name of the value, input or file.
        hint: What the user can do.
        blocking: Whether the target cannot load the model; if not, this is a warning.
    """

    reason: str
    _: KW_ONLY
    at: str | None = None
    hint: str | None = None
    blocking: bool = True

    def __str__(self) -> str:
        at = "" if self.at is None else f" - at `{self.at}`"
        hint = "" if self.hint is None else f" ({self.hint})"
        return f"{self.reason}{at}{hint}"


def warning(reason: str, *, at: str | None = None, hint: str | None = None) -> Incompatibility:
    """Return an incompatibility that does not prevent the target from loading the model."""
    return Incompatibility(reason, at=at, hint=hint, blocking=False)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The form of a cached model that one runtime or compiler expects.

    Attributes:
        name: Name on the command line.
        summary: The client, and the call that loads the folder.
        tested_with: Version of the client that the requirements were read from and tested with.
        cache: The pass that injects the cache: cache mode, names, layouts and type.
        before: Passes that run before it.
        after: Passes that run after it.
        finish: Passes that run last, after verification, because only the client can run their result.
        max_length: Number of tokens that a text may have, unless the caller gives another or the model allows fewer.
            It is the number of rows of static caches, and the `max_length` of passes that leave it open. None if the
            client has no such limit.
        file: Path of the model in the folder of the target.
        variants: Files that replace the model, with all sizes fixed: number of tokens of a call, by file name. They
            share their weights.
        parts: Paths in the folder of the target of further models, which compute inputs of the decoder, by the names
            that they have next to it: `ENCODER`, `EMBEDDING`, `VISION`. The encoder also computes what a second model
            computes for the decoder.
        data: Name of the first external data file, in the folder of the model; further ones end in `_1`, `_2`, ...
            {file} is the name of the model's file. None to keep the names.
        required: Inputs and outputs that the client requires.
        allowed_inputs: Inputs that the client can feed, besides the cache; None for any.
        dtypes: Element types that an input or output may have, by name.
        states: Kinds of states of a fixed size that the client keeps: conv_state, recurrent_state.
        cache_dtypes: Element types that the cache may have; empty for any.
        max_opset: Newest opset version that the client loads; None for any.
        operators: Operators that the client implements; None for any.
        unsupported_operators: Operators that the client does not implement.
        static_axes: Axes of the cache whose size must be fixed in the file.
        uniform: Whether the caches of all layers must have the same shape.
        required_files: Files of the source that the client requires.
        side_files: Functions that return the content of each file written for the client: text, an object to write as
            JSON, or None for no file. They replace files of the source.
        checks: Further checks.
    """

    name: str
    summary: str
    tested_with: str
    cache: Inject = field(default_factory=Inject)
    before: tuple[Pass, ...] = ()
    after: tuple[Pass, ...] = ()
    finish: tuple[Pass, ...] = ()
    max_length: int | None = None
    file: str = "model.onnx"
    variants: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None
    required: tuple[str, ...] = ("input_ids", "logits")
    allowed_inputs: Set[str] | None = None
    dtypes: Mapping[str, Set[str]] = field(default_factory=dict)
    states: Set[str] = frozenset()
    cache_dtypes: Set[str] = frozenset()
    max_opset: int | None = None
    operators: Set[Operator] | None = None
    unsupported_operators: Set[Operator] = frozenset()
    static_axes: tuple[int, ...] = ()
    uniform: bool = False
    required_files: tuple[str, ...] = ()
    side_files: Mapping[str, SideFileWriter] = field(default_factory=dict)
    checks: tuple[Callable[[ModelInfo], Iterable[Incompatibility]], ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes, in order."""
        return (*self.before, self.cache, *self.after, *self.finish)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of all model files."""
        return (*(self.variants or (self.file,)), *self.parts.values())

    def with_max_length(self, max_length: int) -> Target:
        """Return the target for texts of at most `max_length` tokens."""
        cache = replace(self.cache, max_length=max_length) if SEQUENCE in self.static_axes else self.cache
        after, finish = (
            tuple(_with_max_length(one, max_length) for one in passes) for passes in (self.after, self.finish)
        )
        return replace(self, max_length=max_length, cache=cache, after=after, finish=finish)


def _with_max_length(one: Pass, max_length: int) -> Pass:
    """Return the pass with this `max_length` if it leaves its own open."""
    if getattr(one, "max_length", max_length) is not None:
        return one
    return replace(one, max_length=max_length)  # type: ignore[type-var]  # a frozen dataclass, as its field shows
