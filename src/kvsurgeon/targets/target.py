"""What a target is: how a runtime or compiler wants a model with a cache, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Pass
from kvsurgeon.passes.shapes.fix_shapes import FixShapes
from kvsurgeon.targets.facts import Facts, Operator


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Something between a model and a target.

    Attributes:
        what: Expected this, found that.
        at: Name of the value, input or file that it is about.
        hint: What can be done.
        stops: Whether the client cannot take the model at all; else it takes it, and this is worth knowing.
    """

    what: str
    at: str | None = None
    hint: str | None = None
    stops: bool = True

    def __str__(self) -> str:
        where = "" if self.at is None else f" - at `{self.at}`"
        return f"{self.what}{where}" + ("" if self.hint is None else f" ({self.hint})")


@dataclass(frozen=True, kw_only=True)
class SideFile:
    """A file beside the model that the client reads.

    Attributes:
        name: Where it stands in the target's folder.
        write: Its text, or an object to be written as JSON; None where the model needs no such file. What the
            source has under that name is in `Facts.beside`, the config in `Facts.config`, and is replaced.
    """

    name: str
    write: Callable[[Facts], str | Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of several files of a folder, which share their weights: the model for so many tokens at a time.

    Attributes:
        file: Its place in the target's folder.
        tokens: Tokens of a call; half of a text's where those are fewer.
    """

    file: str
    tokens: int

    def fixed(self, max_length: int) -> FixShapes:
        """Return the pass that makes it, for texts of up to `max_length` tokens."""
        return FixShapes(tokens=max(1, min(self.tokens, max_length // 2)), max_length=max_length)


@dataclass(frozen=True, kw_only=True)
class Target:
    """How one runtime or compiler wants a model with a cache.

    Attributes:
        name: What it is called on the command line.
        summary: Who takes the folder, and by which call.
        tried: The version that the contract was read from and tried with.
        cache: CacheMode, names, layouts and type of the cache: the pass that puts it in.
        before: Passes that run before the cache comes in.
        after: Passes that run after it.
        finish: Passes that run last and are not judged, as no host but the client's own can feed what they make.
        max_length: Tokens that a text may have, where the caller asks for no other number and the model takes so many.
            Buffers of a fixed size have as many rows, and passes that leave their `max_length` open are given it. None
            where the client asks for no such number.
        file: The model's place in the target's folder.
        variants: Files that stand there in its stead, in which every size is a number.
        data: Name of the first file of external data, beside the model; further ones get `_1`, `_2`, ... behind it.
            None to leave names as they are.
        needs: Inputs and outputs without which the client cannot work.
        feeds: Inputs that the client knows how to feed, beside the cache; None for any.
        dtypes: Types that an input may have, by its name.
        cache_dtypes: Types that the caches may have; empty for any.
        opset: The newest version of ONNX's operators that the client reads; None for any.
        operators: Operators that it has; None for any.
        banned: Operators that it has not.
        fixed_axes: Axes of the caches whose size must be a number in the file.
        uniform: Whether all layers' caches must have one shape.
        beside: Files of the source that the client cannot do without.
        side_files: Files that are written for the client.
        rules: What else to look at, for what data cannot say.
    """

    name: str
    summary: str
    tried: str
    cache: Inject = field(default_factory=Inject)
    before: tuple[Pass, ...] = ()
    after: tuple[Pass, ...] = ()
    finish: tuple[Pass, ...] = ()
    max_length: int | None = None
    file: str = "model.onnx"
    variants: tuple[Variant, ...] = ()
    data: str | None = None
    needs: tuple[str, ...] = ("input_ids", "logits")
    feeds: frozenset[str] | None = None
    dtypes: Mapping[str, frozenset[str]] | None = None
    cache_dtypes: frozenset[str] = frozenset()
    opset: int | None = None
    operators: frozenset[Operator] | None = None
    banned: frozenset[Operator] = frozenset()
    fixed_axes: tuple[int, ...] = ()
    uniform: bool = False
    beside: tuple[str, ...] = ()
    side_files: tuple[SideFile, ...] = ()
    rules: tuple[Callable[[Facts], Iterable[Obstacle]], ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes, in order."""
        return (*self.before, self.cache, *self.after)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that holds the model."""
        return tuple(variant.file for variant in self.variants) or (self.file,)

    def of_length(self, max_length: int) -> Target:
        """Return the target for texts of up to so many tokens."""
        cache = replace(self.cache, max_length=max_length) if SEQUENCE in self.fixed_axes else self.cache
        before, after, finish = (
            tuple(_of_length(one, max_length) for one in passes) for passes in (self.before, self.after, self.finish)
        )
        return replace(self, max_length=max_length, cache=cache, before=before, after=after, finish=finish)


SEQUENCE = DEFAULT_LAYOUT.index("sequence")


def _of_length(one: Pass, max_length: int) -> Pass:
    """Return the pass with its length, where that is left open."""
    if getattr(one, "max_length", max_length) is not None:
        return one
    return replace(one, max_length=max_length)  # type: ignore[type-var]  # a frozen dataclass, as its field shows
