"""Certificates: what was established about a model, as an in-toto Statement; see `docs/certificate.md`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.errors import InputError, InvalidCertificateError, UsageError
from kvsurgeon.io.atomic_write import file_transaction
from kvsurgeon.io.json_files import read_json
from kvsurgeon.passes.contract import Pass
from kvsurgeon.passes.options import build, texts_of
from kvsurgeon.workflow import registry
from kvsurgeon.workflow.digests import FileDigests, model_files
from kvsurgeon.workflow.pipeline import Pipeline, PipelineRun

if TYPE_CHECKING:
    from kvsurgeon.parity import Effort, Report

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:kvsurgeon:certificate:v1"
NO_CERTIFICATE = "a target has passes that run after verification, so it has no certificate; inject without --target"
_EFFORTS = ("quick", "normal", "thorough")
_PACKAGES = ("kvsurgeon", "onnx", "onnx-ir", "onnxruntime", "numpy")


@dataclass(kw_only=True)
class CertificateWriter:
    """Writes the certificate of one run.

    Attributes:
        path: The certificate.
        original: The file of the source.
        pipeline: The passes.
        files: The files of the source, by name; the model is first.
        digests: Digests of files that were read.
        inputs: The files of the source with their digests before anything is written, which may replace them.
    """

    path: Path
    original: Path
    pipeline: Pipeline
    files: Mapping[str, Path]
    digests: FileDigests = field(default_factory=FileDigests)
    inputs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls, path: str | Path, model: ir.Model, pipeline: Pipeline, destination: Path | None, *, force: bool
    ) -> CertificateWriter:
        """Return a writer for a run that has not begun.

        Args:
            path: The certificate.
            model: The loaded model, unchanged.
            pipeline: The passes.
            destination: The file of the result.
            force: Whether to replace a file that is no certificate.

        Raises:
            UsageError: A certificate cannot be written there, or cannot state the source, the passes or the result.
        """
        path = Path(path).absolute()
        original = io.loaded_from(model)
        if original is None or destination is None:
            raise UsageError("a certificate needs the original and the result in files; give a path for both")
        for one in pipeline.passes:
            _check_nameable(one)
        files = model_files(model, original)
        taken = {one.resolve() for one in (*files.values(), destination)}
        if path.resolve() in taken or (os.path.lexists(path) and not (path.is_file() and (force or _is_ours(path)))):
            raise UsageError(f"expected no file at `{path}`, or a certificate, found another file; choose another path")
        folder = next(one for one in path.parents if one.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"cannot write `{path}`: `{folder}` is not writable")
        return cls(path=path, original=original, pipeline=pipeline, files=files)

    def check(self, run: PipelineRun) -> None:
        """Check that the run can have a certificate, and read its input files, before anything is written.

        Raises:
            UsageError: The results were not verified, or a pass does not preserve them.
        """
        if run.verification is None:
            reason = "verification is skipped" if run.exact else "a pass of this run does not preserve the results"
            raise UsageError(f"a certificate states that the result was verified, but {reason}; omit the certificate")
        self.inputs = _described(self.files, self.digests)

    def write(self, run: PipelineRun) -> Path:
        """Write the certificate of a run whose model was saved, and return its path.

        Raises:
            UsageError: The file cannot be written.
        """
        assert run.path is not None, "the run was saved"
        assert run.verification is not None, "the run was checked"
        outputs = model_files(io.load(run.path), run.path)
        for file in run.files:
            if file.path.is_relative_to(run.path.parent):
                outputs.setdefault(file.path.relative_to(run.path.parent).as_posix(), file.path)
        if self.path.resolve() in {one.resolve() for one in outputs.values()}:
            raise UsageError(f"expected another path for the certificate than that of an output, found `{self.path}`")
        original = {"location": self._location(), "files": self.inputs}
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": _described(outputs, self.digests),
            "predicateType": PREDICATE_TYPE,
            "predicate": {"original": original, **predicate_of(run, self.pipeline, run.verification)},
        }
        with file_transaction() as transaction:
            transaction.make_folder(self.path.parent)
            with transaction.create(self.path) as created:
                created.write((json.dumps(statement, indent=2, allow_nan=False) + "\n").encode())
        return self.path

    def _location(self) -> str:
        """Return the path of the original, relative to the folder of the certificate if possible."""
        original = self.original.parent.resolve() / self.original.name
        with suppress(ValueError):  # another drive of Windows
            original = Path(os.path.relpath(original, self.path.parent.resolve()))
        return original.as_posix()


def tool() -> dict[str, Any]:
    """Return the name of this package, and the versions of all packages that results depend on."""
    return {"name": "kvsurgeon", "versions": {name: version(name) for name in _PACKAGES}}


def predicate_of(run: PipelineRun, pipeline: Pipeline, report: Report) -> dict[str, Any]:
    """Return what a certificate states of a run, except for files."""
    return {
        "tool": tool(),
        "passes": [
            {"name": one.name, "options": texts_of(one), "notes": list(getattr(step.outcome, "notes", ()))}
            for one, step in zip(pipeline.passes, run.steps, strict=True)
        ],
        "proofs": [proof.as_dict() for proof in run.proofs],
        "measurements": _measurements(report),
    }


def _measurements(report: Report) -> dict[str, Any]:
    """Return the verification: its texts, and the largest error and the lowest agreement on each."""
    facts = ("scenario", "batch", "length", "chunks", "padding", "holes", "digest", "verdict", "error", "agreement")
    return {
        "runtime": {"name": "onnxruntime", "provider": "CPUExecutionProvider"},
        "seed": report.seed,
        "effort": report.effort,
        "arithmetic": report.arithmetic,
        "bound": report.bound,
        "required_agreement": report.tolerance.agreement,
        "texts": [{name: getattr(one, name) for name in facts} for one in report.comparisons],
        "notes": list(report.notes),
    }


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate that was read: only its form has been checked.

    Attributes:
        path: The file.
        subject: SHA-256 of each output file, by name; the model is first.
        location: The file of the original model.
        original: SHA-256 of each input file, by name; the model is first.
        pipeline: The passes with their options.
        seed: Random seed of the texts.
        effort: How much was verified.
        predicate: All statements.
    """

    path: Path
    subject: Mapping[str, str]
    location: Path
    original: Mapping[str, str]
    pipeline: Pipeline
    seed: int
    effort: Effort
    predicate: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> Certificate:
        """Read a certificate.

        Raises:
            InputError: There is no such file.
            InvalidCertificateError: It is not a certificate of kvsurgeon.
        """
        path = Path(path).absolute()
        try:
            found = _read(path)
            predicate = found["predicate"]
            return cls(
                path=path,
                subject=_digests(found["subject"]),
                location=Path(os.path.normpath(path.parent.resolve() / predicate["original"]["location"])),
                original=_digests(predicate["original"]["files"]),
                pipeline=Pipeline(_pass(**one) for one in predicate["passes"]),
                seed=predicate["measurements"]["seed"],
                effort=predicate["measurements"]["effort"],
                predicate=predicate,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise InvalidCertificateError(f"`{path}` is not a certificate of kvsurgeon: {error!r}") from error


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a file with the types of a certificate.

    Raises:
        ValueError: It has another form.
        InputError: It cannot be read.
    """
    found = read_json(path, unique=True)
    if set(found) != {"_type", "subject", "predicateType", "predicate"}:
        raise ValueError("expected the fields of an in-toto Statement")
    if (found["_type"], found["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise ValueError(f"expected {STATEMENT_TYPE} and {PREDICATE_TYPE}")
    if not found["predicate"]["passes"]:
        raise ValueError("expected passes")
    measurements = found["predicate"]["measurements"]
    if type(measurements["seed"]) is not int or measurements["seed"] < 0 or measurements["effort"] not in _EFFORTS:
        raise ValueError("expected a seed and an effort")
    return dict(found)


def _is_ours(path: Path) -> bool:
    try:
        return bool(_read(path))
    except (InputError, ValueError, TypeError, KeyError):
        return False


def _described(files: Mapping[str, Path], digests: FileDigests) -> list[dict[str, Any]]:
    return [{"name": name, "digest": {"sha256": digests.of(path)}} for name, path in files.items()]


def _digests(files: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the digests of files by name.

    Raises:
        ValueError: A file is not described by its name and its SHA-256.
    """
    found: dict[str, str] = {}
    for file in files:
        name, digest = file["name"], file["digest"]["sha256"]
        if file != {"name": name, "digest": {"sha256": digest}} or name in found or not isinstance(digest, str):
            raise ValueError(f"expected a name and a SHA-256, found {file}")
        found[name] = digest
    if not found:
        raise ValueError("expected the digests of files, found none")
    return found


def _pass(name: str, options: Mapping[str, str], notes: object) -> Pass:
    found: Pass = build(registry.PASSES.find(name).load(), name, options)
    return found


def _check_nameable(one: Pass) -> None:
    try:
        again: Pass | None = _pass(one.name, texts_of(one), ())
    except (UsageError, ValueError, TypeError):
        again = None
    if type(again) is not type(one) or again != one:
        raise UsageError(f"a certificate cannot state pass {one.name}: its function or its options have no text")
