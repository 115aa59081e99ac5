"""Passes in order: each is checked, timed, and named if it fails."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.errors import KvsurgeonError, ParityError, PassError, UsageError
from kvsurgeon.interop.functions import as_pass_class
from kvsurgeon.io.model_config import record_head_change
from kvsurgeon.passes.contract import Changed, Outcome, Pass, Source, Subject, Unchanged
from kvsurgeon.passes.options import build
from kvsurgeon.passes.validity import problems
from kvsurgeon.workflow import registry

Watch = Callable[[int, str, ir.Model], None]  # passes run so far, the last one's name, the model after it

_PASS = re.compile(
    r"""\s*(?P<name>[\w.-]+)\s*
        (?:\{(?P<options>(?:"[^"]*"|[^{}"]|\{[^{}]*\})*)\})?   # a value may hold {layer}, or be "quoted, like this"
        \s*(?P<end>,|$)""",
    re.VERBOSE,
)
_PIECE = re.compile(r'(?:"[^"]*"|[^,"])+')


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What one pass did."""

    name: str
    outcome: Outcome
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """A model after a pipeline, and what each pass did to it."""

    model: ir.Model
    folder: Path | None
    steps: tuple[PassResult, ...]

    @property
    def changed(self) -> bool:
        """Whether any pass changed the model."""
        return any(isinstance(step.outcome, Changed) for step in self.steps)

    @property
    def exact(self) -> bool:
        """Whether the model computes what it did, by what its passes say."""
        return all(step.outcome.exact for step in self.steps if isinstance(step.outcome, Changed))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the passes want a reader to know."""
        return tuple(note for step in self.steps if isinstance(step.outcome, Changed) for note in step.outcome.notes)


class Pipeline:
    """Passes, in the order in which they run.

    >>> def edit(model: ir.Model) -> None: ...
    >>> Pipeline((edit,))
    Pipeline(edit)

    Attributes:
        passes: What is run, plain functions among them made into passes.
    """

    def __init__(self, passes: Iterable[Pass | Callable[..., Any]]) -> None:
        self.passes = tuple(_as_pass(one) for one in passes)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(one.name for one in self.passes)})"

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Return the pipeline that a text such as `inject,other{option=value,list=1,2}` spells.

        Raises:
            UsageError: It spells none, or names a pass or an option that there is not.
        """
        return cls(build(registry.PASSES.find(name).load(), name, options) for name, options in _parsed(text))

    def run(
        self,
        source: Source,
        *,
        folder: str | Path | None = None,
        verify_each: bool = False,
        watch: Watch | None = None,
    ) -> Result:
        """Return the model after all passes, each of which left it valid. Nothing is written.

        Args:
            source: A file, a folder that holds one, a proto (which stays as it is), or an `ir.Model` (which does not).
            folder: Where the external data of a model in memory lies.
            verify_each: Whether to run the judge after every pass that changed something.
            watch: Called before the first pass, with 0 and "original", and after each.

        Raises:
            UnsupportedError: A pass cannot do its work soundly.
            PassError: A pass raised something else, or left a graph that is not valid.
            ParityError: The judge finds that the model does not compute what it did.
        """
        subject = Subject.of(source, folder)
        original = io.to_proto(subject.model) if verify_each else None
        sound = not problems(subject.model)
        steps: list[PassResult] = []
        if watch is not None:
            watch(0, "original", subject.model)
        for one in self.passes:
            steps.append(_step(one, subject, steps, sound))
            outcome = steps[-1].outcome
            if original is not None and isinstance(outcome, Changed):
                if outcome.exact:
                    _verify(original, subject, steps)
                else:
                    original = io.to_proto(subject.model)  # what is lost on purpose is no fault of later passes
            if watch is not None:
                watch(len(steps), one.name, subject.model)
        return Result(model=subject.model, folder=subject.folder, steps=tuple(steps))


def _as_pass(one: Pass | Callable[..., Any]) -> Pass:
    if isinstance(one, Pass) and not isinstance(one, type):
        return one
    if not inspect.isfunction(one):
        raise UsageError(f"expected a pass or a function, found {one!r}; a pass class has to be called: Inject()")
    made = as_pass_class(one)
    return build(made, made.name, {})  # type: ignore[no-any-return]


def _step(one: Pass, subject: Subject, before: Sequence[PassResult], sound: bool) -> PassResult:
    """Run one pass and look at what it left.

    Raises:
        PassError: It raised, answered with something else than an outcome, or left a graph that is not valid.
    """
    start = time.perf_counter()
    ran = f" (ran before it: {', '.join(step.name for step in before)})" if before else ""
    try:
        outcome = one.apply(subject)
    except KvsurgeonError as error:
        if one.name in registry.BUILT_IN:
            raise
        raise PassError(f"pass {one.name} stopped: {error}{ran}") from error
    except Exception as error:
        raise PassError(f"pass {one.name} raised {type(error).__name__}: {_one_line(error)}{ran}") from error
    if not isinstance(outcome, Changed | Unchanged):
        raise PassError(f"pass {one.name}: expected Changed or Unchanged from it, found {outcome!r}{ran}")
    if isinstance(outcome, Changed):
        subject.changed()
        if outcome.heads is not None:
            record_head_change(subject.model, outcome.heads)
        found = problems(subject.model, by_checker=sound)
        if found:
            raise PassError(f"pass {one.name} left a graph that is not valid: {_listed(found)}{ran}")
    return PassResult(name=one.name, outcome=outcome, seconds=time.perf_counter() - start)


def _verify(original: onnx.ModelProto, subject: Subject, steps: Sequence[PassResult]) -> None:
    from kvsurgeon.workflow.verification import judge  # onnxruntime is slow to import, and not needed otherwise

    sameness = judge(original, io.to_proto(subject.model), folder=subject.folder)
    if sameness.verdict != "same":
        ran = ", ".join(step.name for step in steps)
        raise ParityError(f"after pass {steps[-1].name} (ran: {ran}): {_listed(sameness.problems)}")


def _parsed(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each pass's name and the texts of its options."""
    start, more = 0, True
    while more:
        match = _PASS.match(text, start)
        if match is None:
            raise UsageError(
                f"expected passes such as inject,other{{option=value}}, found {text[start:]!r} - at character {start}"
            )
        yield match["name"], _options(match["name"], match["options"] or "")
        start, more = match.end(), match["end"] == ","


def _options(name: str, text: str) -> dict[str, str]:
    """Return the options in a pair of braces; a piece without `=` goes on with the list before it."""
    options: dict[str, str] = {}
    dim_names = ""
    for piece in _PIECE.findall(text):
        key, equals, value = piece.partition("=")
        if equals:
            dim_names = key.strip()
            if dim_names in options:
                raise UsageError(f"pass {name}: option {dim_names} is given twice")
            options[dim_names] = value.strip().strip('"')
        elif dim_names:
            options[dim_names] += f",{piece.strip()}"
        else:
            raise UsageError(f"pass {name}: expected option=value, found {piece!r}")
    return options


def _listed(found: Sequence[str]) -> str:
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0]}{more}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
