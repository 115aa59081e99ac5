"""Pipelines: passes that run in order, each checked and timed."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.errors import (
    Code,
    InternalError,
    KvsurgeonError,
    ParityError,
    PassError,
    UnsupportedError,
    UsageError,
    describe_exception,
)
from kvsurgeon.interop.functions import as_pass_class
from kvsurgeon.io.loading import Source
from kvsurgeon.io.model_config import ModelHeads, record_head_change
from kvsurgeon.passes.contract import Changed, Companion, Outcome, Pass, Subject, Unchanged
from kvsurgeon.passes.interface.rename_io import rename
from kvsurgeon.passes.options import build
from kvsurgeon.passes.validity import problems
from kvsurgeon.plugins import Catalogue
from kvsurgeon.workflow import registry
from kvsurgeon.workflow.companions import connected
from kvsurgeon.workflow.provenance import UNKNOWN, digest_of, record_provenance

if TYPE_CHECKING:
    from kvsurgeon.parity import AccuracyLoss, Report
    from kvsurgeon.proof.proof import Proof

PassCallback = Callable[[int, str, ir.Model], None]  # number of passes that ran, name of the last one, the model

_PASS = re.compile(
    r"""\s*(?P<name>[\w.-]+)\s*
        (?:\{(?P<options>(?:"[^"]*"|[^{}"]|\{[^{}]*\})*)\})?   # a value may hold {layer}, or be "quoted, like this"
        \s*(?P<end>,|$)""",
    re.VERBOSE,
)
_PIECE = re.compile(r'(?:"[^"]*"|[^,"])+')


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """The result of one pass.

    Attributes:
        name: Name of the pass.
        outcome: What it changed, or why it changed nothing.
        seconds: Its run time, the check of the graph included.
    """

    name: str
    outcome: Outcome
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """The result of a pipeline.

    Attributes:
        model: The model after the last pass.
        folder: The folder of its weights and side files; None if it has none.
        steps: The result of each pass, in order.
        verification: The report of the verifier; None if it did not run, or if a pass is not exact.
        loss: The loss of accuracy, if a pass is not exact; None if it was not measured.
        path: The file that was written, or the folder of several; None if nothing was written.
        files: All files that were written, side files included, the certificate not.
        certificate: The certificate that was written, if any.
    """

    model: ir.Model
    folder: Path | None = None
    steps: tuple[PassResult, ...]
    verification: Report | None = None
    loss: AccuracyLoss | None = None
    path: Path | None = None
    files: tuple[io.WrittenFile, ...] = ()
    certificate: Path | None = None

    def __repr__(self) -> str:
        """Return the passes and the verdict, without the model."""
        passes = ", ".join(step.name for step in self.steps)
        verdict = "not verified" if self.verification is None else self.verification.verdict
        written = "" if self.path is None else f", written to {self.path}"
        return f"{type(self).__name__}({passes}: {verdict if self.loss is None else 'lossy'}{written})"

    def to_proto(self) -> onnx.ModelProto:
        """Return the model as a proto; its external data stays in its files."""
        return io.to_proto(self.model)

    def save(self, destination: str | Path, **options: Any) -> Path:
        """Save the model, the models that compute its inputs, and the side files; return the path of the model.

        Args:
            destination: An .onnx file or a folder.
            **options: `source`, `link_weights`, `pack` and `force` of `kvsurgeon.save`.

        Raises:
            UsageError: The destination cannot be written to.
        """
        path = io.destination_of(self.model, destination, source=options.get("source"))
        models = {path.name: self.model, **{name: one.model for name, one in self.companions.items()}}
        io.save_variants(models, path.parent, **options)
        return path

    @property
    def changes(self) -> tuple[Changed, ...]:
        """The outcomes of the passes that changed the model."""
        return tuple(step.outcome for step in self.steps if isinstance(step.outcome, Changed))

    @property
    def companions(self) -> dict[str, Companion]:
        """Models that compute inputs of the model, by file name."""
        return {name: one for change in self.changes for name, one in change.companions.items()}

    @property
    def changed(self) -> bool:
        """Whether a pass changed the model."""
        return bool(self.changes)

    @property
    def cache_bytes(self) -> tuple[int, int] | None:
        """Bytes of the cache of a sequence before the first pass that changes them and after the last; None without."""
        found = [change.cache_bytes for change in self.changes if change.cache_bytes is not None]
        return (found[0][0], found[-1][1]) if found else None

    @property
    def original(self) -> Path | None:
        """The model to which the loss is measured, if a pass names one."""
        return next((change.original for change in reversed(self.changes) if change.original is not None), None)

    @property
    def exact(self) -> bool:
        """Whether all passes preserve the results of the model."""
        return all(change.exact for change in self.changes)

    @property
    def thresholds(self) -> frozenset[int]:
        """Lengths, in tokens, after which the model may compute something else, as the proofs of the passes name."""
        return frozenset(threshold for proof in self.proofs for threshold in proof.thresholds)

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """The proofs of the passes that added a cache."""
        return tuple(change.proof for change in self.changes if change.proof is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the passes for the user, each once."""
        return tuple(dict.fromkeys(note for change in self.changes for note in change.notes))


class Pipeline:
    """Passes in the order in which they run.

    >>> def edit(model: ir.Model) -> None: ...
    >>> Pipeline((edit,))
    Pipeline(edit)

    Attributes:
        passes: The passes; plain functions are converted to passes.
    """

    def __init__(self, passes: Iterable[Pass | Callable[..., Any]]) -> None:
        self.passes = tuple(_as_pass(one) for one in passes)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(one.name for one in self.passes)})"

    @classmethod
    def parse(cls, text: str, passes: Catalogue[type[Any]] = registry.PASSES) -> Pipeline:
        """Return the pipeline of a text such as `inject,other{option=value,list=1,2}`.

        Args:
            text: Names and options of the passes.
            passes: The passes by name.

        Raises:
            UsageError: The text is malformed, or a pass or an option is unknown.
        """
        return cls(build(passes.find(name).load(), name, options) for name, options in _parse(text))

    def run(
        self,
        source: Subject | Source,
        *,
        folder: str | Path | None = None,
        verify_each: bool = False,
        on_pass: PassCallback | None = None,
    ) -> PipelineRun:
        """Run all passes and return the model, with its provenance in its metadata. Nothing is written.

        Args:
            source: A file, a folder that holds one, a proto (which is not changed), or an `ir.Model` (which is).
            folder: The folder of the external data of a model in memory.
            verify_each: Whether to verify the model after every pass that changed it.
            on_pass: Called before the first pass, with 0 and "original", and after each pass.

        Raises:
            UnsupportedError: A pass does not support the model.
            PassError: A pass raised another exception, or left an invalid graph.
            ParityError: After a pass, the results of the model differ.
        """
        subject = Subject.of(source, folder)
        reference = io.to_proto(subject.model, subject.folder) if verify_each else None
        was_valid = not problems(subject.model)
        digest = digest_of(subject.model) if was_valid else UNKNOWN
        steps: list[PassResult] = []
        if on_pass is not None:
            on_pass(0, "original", subject.model)
        for one in self.passes:
            steps.append(_run_pass(one, subject, steps, by_checker=was_valid))
            outcome = steps[-1].outcome
            if reference is not None and isinstance(outcome, Changed):
                if outcome.exact:
                    _verify(reference, PipelineRun(model=subject.model, folder=subject.folder, steps=tuple(steps)))
                else:
                    reference = io.to_proto(subject.model, subject.folder)  # later passes preserve the lossy result
            if on_pass is not None:
                on_pass(len(steps), one.name, subject.model)
        changed = [one for one, step in zip(self.passes, steps, strict=True) if isinstance(step.outcome, Changed)]
        if changed:
            record_provenance(subject.model, digest, changed)
        return PipelineRun(model=subject.model, folder=subject.folder, steps=tuple(steps))


def first_of(problems: Sequence[str]) -> str:
    """Return the first of several problems, and the number of the others.

    >>> first_of(["cycle", "unknown operator", "no output"])
    'cycle (and 2 more)'
    """
    return f"{problems[0]} (and {len(problems) - 1} more)" if problems[1:] else problems[0]


def _as_pass(one: Pass | Callable[..., Any]) -> Pass:
    if isinstance(one, Pass) and not isinstance(one, type):
        return one
    if not inspect.isfunction(one):
        raise UsageError(f"expected a pass or a function, found {one!r}; call the class of a pass: Inject()")
    made = as_pass_class(one)
    return build(made, made.name, {})  # type: ignore[no-any-return]


def _run_pass(one: Pass, subject: Subject, before: Sequence[PassResult], *, by_checker: bool) -> PassResult:
    """Run one pass and check the graph.

    Raises:
        PassError: The pass raised, returned no outcome, or left an invalid graph.
        UnsupportedError: A pass before it wrote a second model that is a part of the model.
    """
    start = time.perf_counter()
    ran = f" (passes before it: {', '.join(step.name for step in before)})" if before else ""
    outcome = _apply(one, subject, ran)
    if not isinstance(outcome, Changed | Unchanged) or not _is_well_formed(outcome):
        raise PassError(f"pass {one.name}: expected it to return Changed or Unchanged, found {outcome!r}{ran}")
    if not isinstance(subject.model, ir.Model):
        raise PassError(f"pass {one.name}: expected it to leave an onnx_ir.Model, found {subject.model!r}{ran}")
    if isinstance(outcome, Changed):
        _check_parts(one, before)
        subject.changed()
        if outcome.heads is not None:
            record_head_change(subject.model, outcome.heads)
        found = problems(subject.model, by_checker=by_checker)
        if found:
            raise PassError(f"pass {one.name} left an invalid graph: {first_of(found)}{ran}")
    return PassResult(name=one.name, outcome=outcome, seconds=time.perf_counter() - start)


def _check_parts(one: Pass, before: Sequence[PassResult]) -> None:
    """Check that a second model is still a part of the model that a pass has changed.

    Raises:
        UnsupportedError: A pass before it wrote one.
    """
    for step in before:
        companions = step.outcome.companions if isinstance(step.outcome, Changed) else {}
        part = next((name for name, companion in companions.items() if not companion.connections), None)
        if part is not None:
            raise UnsupportedError(
                f"`{part}` is a part of the model before {one.name}, and not of its result",
                code=Code.PASS_PRECONDITION, hint=f"run {step.name} last",
            )  # fmt: skip


def _apply(one: Pass, subject: Subject, ran: str) -> Outcome:
    """Return the outcome of a pass.

    Raises:
        PassError: The pass is not built in, and raised.
        InternalError: It is built in, and raised an exception that is not an error of this package.
    """
    is_built_in = one.name in registry.BUILT_IN
    try:
        return one.apply(subject)
    except KvsurgeonError as error:
        if is_built_in:
            raise
        raise PassError(f"pass {one.name} failed: {error}{ran}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit
        if is_built_in:
            raise InternalError(error, where=f"pass {one.name}{ran}") from error
        raise PassError(f"pass {one.name} raised {describe_exception(error)}{ran}") from error


def _is_well_formed(outcome: Outcome) -> bool:
    """Whether the fields of an outcome have their types: a report is written after the files."""
    if isinstance(outcome, Unchanged):
        return isinstance(outcome.reason, str)
    heads = outcome.heads is None or all(isinstance(one, ModelHeads) for one in outcome.heads)
    notes = isinstance(outcome.notes, tuple) and all(isinstance(note, str) for note in outcome.notes)
    names = isinstance(outcome.renamed, Mapping) and all(isinstance(one, str) for one in outcome.renamed.values())
    return isinstance(outcome.edits, int) and notes and heads and names


def _verify(reference: onnx.ModelProto, run: PipelineRun) -> None:
    from kvsurgeon.workflow.verification import verify_models  # onnxruntime is slow to import

    result = io.to_proto(connected(run.model, run.companions), run.folder)
    reference = renamed_reference(reference, run)
    found = verify_models(reference, result, folder=run.folder, thresholds=run.thresholds)
    if found.verdict != "same":
        ran = ", ".join(step.name for step in run.steps)
        raise ParityError(f"after pass {run.steps[-1].name} (passes: {ran}): {first_of(found.problems)}")


def renamed_reference(reference: onnx.ModelProto, run: PipelineRun) -> onnx.ModelProto:
    """Return the reference model with the names that passes gave to its inputs and outputs."""
    maps = [change.renamed for change in run.changes if change.renamed]
    if not maps:
        return reference
    model = io.load(reference, folder=run.folder)
    for names in maps:
        rename(model, names)
    return io.to_proto(model, run.folder)


def _parse(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name of each pass and the texts of its options."""
    start, more = 0, True
    while more:
        match = _PASS.match(text, start)
        if match is None:
            raise UsageError(
                f"expected passes such as inject,other{{option=value}}, found {text[start:]!r} - at character {start}"
            )
        yield match["name"], _parse_options(match["name"], match["options"] or "")
        start, more = match.end(), match["end"] == ","


def _parse_options(name: str, text: str) -> dict[str, str]:
    """Return the options in a pair of braces; a piece without `=` continues the list before it."""
    options: dict[str, str] = {}
    option = ""
    for piece in _PIECE.findall(text):
        key, equals, value = piece.partition("=")
        if equals:
            option = key.strip()
            if option in options:
                raise UsageError(f"pass {name}: option {option} is given twice")
            options[option] = value.strip().strip('"')
        elif option:
            options[option] += f",{piece.strip()}"
        else:
            raise UsageError(f"pass {name}: expected option=value, found {piece!r}")
    return options
