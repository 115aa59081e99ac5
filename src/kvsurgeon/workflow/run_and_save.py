"""Run a pipeline on a model, verify the result, and save it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from kvsurgeon import io
from kvsurgeon.errors import Code, LossError, ParityError, UnsupportedError, UsageError, WeightsError
from kvsurgeon.io.external_data import external_tensors
from kvsurgeon.io.loading import Source
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.workflow.certificate import CertificateWriter
from kvsurgeon.workflow.companions import connected
from kvsurgeon.workflow.pipeline import PassCallback, PassResult, Pipeline, PipelineRun, first_of, renamed_reference

if TYPE_CHECKING:
    from kvsurgeon.parity import Effort, Progress, Report


def run_and_save(
    source: Subject | Source,
    pipeline: Pipeline,
    destination: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    verify: bool = True,
    effort: Effort = "normal",
    seed: int | None = None,
    verify_each: bool = False,
    link_weights: bool = False,
    pack: bool = False,
    force: bool = False,
    text: str | Path | None = None,
    per_layer: bool = False,
    max_loss: float | None = None,
    certificate: str | Path | None = None,
    on_pass: PassCallback | None = None,
    progress: Progress | None = None,
) -> PipelineRun:
    """Run a pipeline on a model, verify the result, and write it. If verification fails, nothing is written.

    Args:
        source: A file, a folder that holds one, or a model in memory.
        pipeline: The passes to run.
        destination: An .onnx file or a folder, which may be the source itself; None to write nothing.
        folder: The folder of the external data of a model in memory.
        verify: Whether to verify the result against the original.
        effort: How many texts the verifier compares, and of which lengths.
        seed: Random seed of the texts; None draws one, which the report names.
        verify_each: Whether to verify after every pass.
        link_weights: Whether to link external data into another folder instead of copying it; see `kvsurgeon.save`.
        pack: Whether to write all weights to one new data file; see `kvsurgeon.save`.
        force: Whether to replace data files and side files of other content; see `kvsurgeon.save`.
        text: A text file: passes are calibrated on its first half, and the loss of those that are not exact is measured
            on the second. None to calibrate none, and measure on a built-in text.
        per_layer: Whether to measure the loss of each attention layer too.
        max_loss: Largest loss that is allowed, in nats of KL divergence per token; None for any.
        certificate: A file to write the certificate of the result to; None to write none.
        on_pass: See `Pipeline.run`.
        progress: Called by passes that take minutes before each step, and by the verifier before each scenario.

    Raises:
        UsageError: The result or the certificate cannot be written.
        WeightsError: The verifier needs weights whose folder is not known.
        UnsupportedError: A pass does not support the model, no pass changed it, or the verifier cannot run it.
        ParityError: The results of the model differ from those of the original.
        LossError: The loss is above `max_loss`.
    """
    if max_loss is not None and not verify:
        raise UsageError("expected verification with --max-loss, found --no-verify: the loss would not be measured")
    subject = Subject.of(source, folder)
    subject.text = subject.text if text is None else Path(text)
    subject.progress = progress
    origin = source if isinstance(source, str | Path) else None
    path = None if destination is None else io.destination_of(subject.model, destination, source=origin)
    writer = None
    if certificate is not None:
        if origin is None:
            raise UsageError("a certificate needs the original in a file; give its path as the source")
        writer = CertificateWriter.of(certificate, subject.model, pipeline, path, force=force)
    reference = reference_of(subject) if verify or verify_each else None
    run = pipeline.run(subject, verify_each=verify_each, on_pass=on_pass)
    if not run.changed:
        raise UnsupportedError(_unchanged(run.steps), code=Code.UNCHANGED, hint="nothing was written")
    run = note_unreadable(run)
    if verify and reference is not None:
        run = verify_run(run, reference, destination, text=subject.text, per_layer=per_layer, effort=effort, seed=seed,
            progress=progress)  # fmt: skip
        _check_loss(run, max_loss)
    if path is None:
        return run
    if writer is not None and run.companions:
        raise UsageError("a certificate is about one model, and this pass writes a second one; run it without")
    if writer is not None:
        writer.check(run)
    models = {path.name: run.model, **{name: one.model for name, one in run.companions.items()}}
    files = io.save_variants(models, path.parent, source=origin, link_weights=link_weights, pack=pack, force=force)
    run = replace(run, path=path, files=files)
    return run if writer is None else replace(run, certificate=writer.write(run))


def note_unreadable(run: PipelineRun) -> PipelineRun:
    """Return a run with a note if the injected cache cannot be found again, as `inspect` and other passes do.

    The attention is not proved to be causal again: that takes as long as the injection.
    """
    place = max((at for at, step in enumerate(run.steps) if isinstance(step.outcome, Changed)), default=0)
    last = run.steps[place]
    if last.name != Inject.name or not isinstance(last.outcome, Changed):
        return run
    try:
        Subject(model=run.model, folder=run.folder).cache()
    except UnsupportedError as error:
        note = f"inspect and passes cannot read the cache of the result: {error}"
        outcome = replace(last.outcome, notes=(*last.outcome.notes, note))
        return replace(run, steps=(*run.steps[:place], replace(last, outcome=outcome), *run.steps[place + 1 :]))
    return run


def reference_of(subject: Subject) -> onnx.ModelProto:
    """Return the model as it is now, for later verification.

    Raises:
        WeightsError: The folder of its external data is not known.
    """
    external = next(external_tensors(subject.model), None)
    if subject.folder is None and external is not None:
        raise WeightsError(
            f"expected a folder for the external data of a model in memory (`{external.location}`), found none; "
            "give folder=..., or verify=False"
        )
    return io.to_proto(subject.model, subject.folder)


def verify_run(
    run: PipelineRun,
    reference: onnx.ModelProto,
    destination: str | Path | None = None,
    *,
    text: str | Path | None = None,
    per_layer: bool = False,
    effort: Effort = "normal",
    seed: int | None = None,
    progress: Progress | None = None,
) -> PipelineRun:
    """Return the run with its verification or, if a pass is not exact, with its loss.

    Raises:
        UnsupportedError: The verifier cannot run the model.
        ParityError: The results of the model differ from those of the reference.
    """
    reference = renamed_reference(reference, run)
    with io.staged(connected(run.model, run.companions), destination, run.folder) as candidate:
        if run.exact:
            report = _verify(
                reference, candidate, folder=run.folder, effort=effort, seed=seed, thresholds=run.thresholds,
                progress=progress,
            )  # fmt: skip
            return replace(run, verification=report)
        _verify_weights(run, candidate, effort=effort, seed=seed)
        from kvsurgeon.workflow.loss import measure_loss  # onnxruntime is slow to import

        loss = measure_loss(
            run.original or reference, candidate, text=text, per_layer=per_layer, folder=run.folder, progress=progress,
            graph=run.model, held_out=text is not None,
        )  # fmt: skip
        return replace(run, loss=loss)


def _check_loss(run: PipelineRun, most: float | None) -> None:
    """Check that the loss of a run, if any, is within its bound.

    Raises:
        LossError: It is not.
    """
    if run.loss is not None and most is not None and not run.loss.kl_divergence <= most:
        raise LossError(
            f"expected an accuracy loss of at most {most:g} nats per token, found {run.loss.kl_divergence:.3g} on "
            f"{run.loss.text}"
        )


def _verify_weights(run: PipelineRun, candidate: onnx.ModelProto, **options: Any) -> None:
    """Verify passes that are not exact: a loss must come from their weights, not from their connections.

    Raises:
        ParityError: A pass computes something else than the graph before it with the new weights.
        UnsupportedError: The verifier cannot run a model.
    """
    from kvsurgeon.workflow.verification import verify_models  # onnxruntime is slow to import

    pairs = [pair for change in run.changes if change.equal_models is not None for pair in change.equal_models()]
    for number, (expected, found) in enumerate(pairs, 1):
        with io.staged(expected, None, run.folder) as reference, io.staged(found, None, run.folder) as result:
            last = number == len(pairs)  # passes after it are exact
            report = verify_models(reference, candidate if last else result, folder=run.folder, **options)
        _check(report, "the original graph with the same weights")


def _verify(reference: onnx.ModelProto, candidate: onnx.ModelProto, **options: Any) -> Report:
    from kvsurgeon.workflow.verification import verify_models  # onnxruntime is slow to import

    found = verify_models(reference, candidate, **options)
    _check(found, "the original")
    return found


def _check(report: Report, what: str) -> None:
    """Check that the verdict is "same".

    Raises:
        ParityError: The results differ.
        UnsupportedError: They cannot be compared.
    """
    if report.verdict == "different":
        problem = first_of(report.problems)
        raise ParityError(f"the results of the model differ from those of {what}: {problem}; seed {report.seed}")
    if report.verdict == "unknown":
        raise UnsupportedError(
            f"cannot verify the result: {'; '.join(report.problems)}", code=Code.NOT_VERIFIABLE,
            hint="skip verification by --no-verify, or verify=False",
        )  # fmt: skip


def _unchanged(steps: tuple[PassResult, ...]) -> str:
    reasons = (f"{one.name}: {one.outcome.reason}" for one in steps if isinstance(one.outcome, Unchanged))
    return f"the model is unchanged: {'; '.join(reasons) or 'the pipeline is empty'}"
