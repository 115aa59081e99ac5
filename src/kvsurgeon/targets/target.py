"""What a target is: how a runtime or compiler wants a model with a cache, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvsurgeon.passes.contract import Pass
from kvsurgeon.passes.inject import Inject
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
            source has under that name is in `Facts.config` if it is the config, and is replaced.
    """

    name: str
    write: Callable[[Facts], str | Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """How one runtime or compiler wants a model with a cache.

    Attributes:
        name: What it is called on the command line.
        summary: Who takes the folder, and by which call.
        tried: The version that the contract was read from and tried with.
        cache: Idiom, names, layouts and type of the cache: the pass that puts it in.
        before: Passes that run before the cache comes in.
        after: Passes that run after it.
        finish: Passes that run last and are not judged, as no host but the client's own can feed what they make.
        file: The model's place in the target's folder.
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
    file: str = "model.onnx"
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
