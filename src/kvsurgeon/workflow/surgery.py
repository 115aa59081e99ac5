"""A pipeline on a file: what it makes is judged before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.errors import ParityError, UnsupportedError, WeightsError
from kvsurgeon.io.external_data import external_tensors
from kvsurgeon.io.side_files import LinkMode
from kvsurgeon.passes.contract import Source, Subject, Unchanged
from kvsurgeon.workflow.pipeline import PassResult, Pipeline, Watch

if TYPE_CHECKING:
    from kvsurgeon.parity import Loss, Progress, Report
    from kvsurgeon.workflow.verification import Sameness


@dataclass(frozen=True, kw_only=True)
class Surgery:
    """What was done to a model.

    Attributes:
        model: The model as it is now.
        steps: What each pass did.
        sameness: What the judge said; None where it was not asked, or where something was lost on purpose.
        loss: How much was lost, where a pass is not exact and the judge was asked.
        path: Where the model was written to; None where it was not.
    """

    model: ir.Model
    steps: tuple[PassResult, ...]
    sameness: Sameness | None = None
    loss: Loss | None = None
    path: Path | None = None

    @property
    def report(self) -> Report | None:
        """All that the judge tried, where a cache came in."""
        return None if self.sameness is None else self.sameness.report

    @property
    def notes(self) -> tuple[str, ...]:
        """What the passes want a reader to know."""
        return tuple(note for step in self.steps for note in getattr(step.outcome, "notes", ()))


def operate(
    source: Source,
    pipeline: Pipeline,
    destination: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    verify: bool = True,
    verify_each: bool = False,
    link_mode: LinkMode = "link",
    pack: bool = False,
    text: str | Path | None = None,
    per_layer: bool = False,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> Surgery:
    """Run `pipeline` on a model and write what it makes, if the judge agrees; else nothing is written.

    Args:
        source: A file, a folder that holds one, or a model in memory.
        pipeline: What to do.
        destination: An .onnx file or a folder, which may be the source itself; None to write nothing.
        folder: Where the external data of a model in memory lies.
        verify: Whether to run the judge on the result.
        verify_each: Whether to run it after every pass.
        link_mode: How external data gets into another folder; see `kvsurgeon.save`.
        pack: Whether all weights go into one new data file; see `kvsurgeon.save`.
        text: A file of text on which to measure what passes that are not exact lose; None takes one that ships.
        per_layer: Whether to measure that for each attention layer too.
        watch: See `Pipeline.run`.
        progress: Told by the judge before each trial.

    Raises:
        WeightsError: The judge needs weights, and nobody knows where they are.
        UnsupportedError: The model cannot be handled soundly, nothing was to be done, or the judge cannot run the
            original.
        ParityError: The judge finds that the result does not compute what the original computes.
    """
    subject = Subject.of(source, folder)
    if verify or verify_each:
        _require_weights(subject)
    original = io.to_proto(subject.model) if verify else None
    result = pipeline.run(subject.model, folder=subject.folder, verify_each=verify_each, watch=watch)
    if not result.changed:
        raise UnsupportedError(_nothing_done(result.steps), hint="nothing was written")
    sameness = loss = path = None
    if original is not None:
        with io.staged(result.model, destination) as now:
            if result.exact:
                sameness = _judged(original, now, subject.folder, progress)
            else:
                from kvsurgeon.workflow.loss import measure  # onnxruntime is slow to import

                loss = measure(
                    original, now, text=text, per_layer=per_layer, folder=subject.folder, progress=progress,
                    described=result.model,
                )  # fmt: skip
    if destination is not None:
        origin = source if isinstance(source, str | Path) else None
        path = io.save(result.model, destination, source=origin, link_mode=link_mode, pack=pack)
    return Surgery(model=result.model, steps=result.steps, sameness=sameness, loss=loss, path=path)


def _require_weights(subject: Subject) -> None:
    outside = next(external_tensors(subject.model), None)
    if subject.folder is None and outside is not None:
        raise WeightsError(
            f"expected a folder for the external data of a model in memory (`{outside.location}`), found none; "
            "give folder=..., or verify=False"
        )


def _judged(
    original: onnx.ModelProto, now: onnx.ModelProto, folder: Path | None, progress: Progress | None
) -> Sameness:
    from kvsurgeon.workflow.verification import (
        judge,  # onnxruntime is slow to import, and not needed where nothing is judged
    )

    sameness = judge(original, now, folder=folder, progress=progress)
    if sameness.verdict == "different":
        more = f" (and {len(sameness.problems) - 1} more)" if len(sameness.problems) > 1 else ""
        raise ParityError(f"the result does not compute what the original computes: {sameness.problems[0]}{more}")
    if sameness.verdict == "unknown":
        raise UnsupportedError(
            f"the result cannot be verified here: {'; '.join(sameness.problems)}",
            hint="--no-verify, or verify=False, writes it unjudged",
        )
    return sameness


def _nothing_done(steps: tuple[PassResult, ...]) -> str:
    reasons = (f"{one.name}: {one.outcome.reason}" for one in steps if isinstance(one.outcome, Unchanged))
    return f"the model is unchanged: {'; '.join(reasons) or 'the pipeline is empty'}"
