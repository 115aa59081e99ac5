"""Confirmation of certificates: everything that a certificate states is done again, and compared.

The digests of all files are computed; the passes run on the original, which proves the obligations again and gives the
graph and the weights again; the verifier runs on the same texts, and on new ones, as a certificate may have been made
with texts that do not show a fault.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from kvsurgeon import io
from kvsurgeon.errors import CertificateError, Code, InputError, KvsurgeonError, UnsupportedError
from kvsurgeon.io.external_data import is_relative_location
from kvsurgeon.io.saving import side_files_of
from kvsurgeon.passes.contract import Subject
from kvsurgeon.proof.proof import Obligation
from kvsurgeon.workflow.certificate import Certificate, predicate_of, tool
from kvsurgeon.workflow.digests import FileDigests, different_part, model_files
from kvsurgeon.workflow.pipeline import PipelineRun, first_of, renamed_reference
from kvsurgeon.workflow.run_and_save import note_unreadable, reference_of

if TYPE_CHECKING:
    from kvsurgeon.parity import Effort, Progress, Report

_OTHER_MACHINE = 10  # ratio of bounds by the noise of two machines, whose kernels add in other orders
_SHOWN = 80  # characters of a value in a message
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """A certificate whose statements all hold.

    Attributes:
        model: The model.
        original: The model of which it is the result.
        files: The files whose digests hold, those of the original included.
        obligations: The obligations, established again.
        repeated: The verification on the texts of the certificate.
        fresh: The verification on new texts.
    """

    model: Path
    original: Path
    files: tuple[Path, ...]
    obligations: tuple[Obligation, ...]
    repeated: Report
    fresh: Report

    def as_dict(self) -> dict[str, Any]:
        """Return the confirmation for JSON."""
        return {
            "confirmed": True,
            "model": str(self.model),
            "original": str(self.original),
            "files": list(map(str, self.files)),
            "obligations": list(map(asdict, self.obligations)),
            "repeated": self.repeated.as_dict(),
            "fresh": self.fresh.as_dict(),
        }


def confirm(
    certificate: str | Path, model: str | Path, original: str | Path | None = None, *, progress: Progress | None = None
) -> Confirmation:
    """Confirm that everything a certificate states of a model holds. Nothing is written.

    Args:
        certificate: The certificate.
        model: The model that it was written for, in the folder of its data files and side files.
        original: The original model; None if it is where the certificate says.
        progress: Called by the verifier before each scenario.

    Raises:
        InputError: A file cannot be read.
        InvalidCertificateError: The file is not a certificate.
        CertificateError: A statement does not hold.
        UnsupportedError: The original is not there, or other versions of packages are installed.
    """
    stated = Certificate.read(certificate)
    path, digests = io.find_model(model).absolute(), FileDigests()
    files = _check_files(stated.subject, path, "the model", digests)
    _check_names(files, path, "the model", side_files=True)
    try:
        source = io.find_model(stated.location if original is None else original).absolute()
    except InputError as error:
        raise UnsupportedError(
            "the digests of the model hold, but nothing else can be confirmed without the original",
            code=Code.NOT_CONFIRMABLE, hint=f"give the original before the model: {error}",
        ) from error  # fmt: skip
    originals = _check_files(stated.original, source, "the original", digests)
    _check_names(originals, source, "the original", side_files=False)
    versions = _other_versions(stated.predicate)
    try:
        found = _Repetition(stated=stated, path=path, source=source, digests=digests, progress=progress).confirm()
    except (KvsurgeonError, KeyError, TypeError, AttributeError) as error:  # also of statements of another form
        if versions:
            raise UnsupportedError(f"{versions}: {error}", code=Code.NOT_CONFIRMABLE) from error
        if isinstance(error, CertificateError):
            raise
        raise CertificateError(f"the statements of the certificate cannot be established again: {error}") from error
    if versions:
        raise UnsupportedError(f"{versions}; all other statements hold", code=Code.NOT_CONFIRMABLE)
    return Confirmation(model=path, original=source, files=(*files.values(), *originals.values()), **found)


def _check_files(stated: Mapping[str, str], path: Path, what: str, digests: FileDigests) -> dict[str, Path]:
    """Return the files of a model by name, whose digests are those that a certificate states.

    Raises:
        CertificateError: A file is missing, or is another one.
    """
    first, *others = stated
    files = {first: path, **{name: path.parent / name for name in others}}
    for name, file in files.items():
        if not is_relative_location(name):
            raise CertificateError(f"expected names of files in one folder, found `{name}`")
        try:
            digest = digests.of(file)
        except InputError as error:
            raise CertificateError(f"a file of {what} cannot be read: {error}") from error
        if digest != stated[name]:
            raise CertificateError(
                f"the digest of `{file}` is not that of a file of {what} in the certificate; expected sha256 "
                f"{stated[name]}, found {digest}"
            )
    return files


def _check_names(files: Mapping[str, Path], path: Path, what: str, *, side_files: bool) -> None:
    """Check that a model consists of these files; of no others, unless there may be side files.

    Raises:
        CertificateError: It does not.
    """
    names, needed = set(list(files)[1:]), model_files(io.load(path), path).keys() - {path.name}
    wrong = needed - names if side_files else needed ^ names
    if wrong:
        raise CertificateError(f"expected the digests of the files of {what}, found others; such as `{min(wrong)}`")


@dataclass(frozen=True, kw_only=True)
class _Repetition:
    """A second run of the passes and the verifier.

    Attributes:
        stated: The certificate.
        path: The model.
        source: The original.
        digests: Digests of the files that were read.
        progress: Called by the verifier before each scenario.
    """

    stated: Certificate
    path: Path
    source: Path
    digests: FileDigests
    progress: Progress | None = field(repr=False)

    def confirm(self) -> dict[str, Any]:
        """Return what was established again; see `Confirmation`.

        Raises:
            CertificateError: A statement does not hold.
            KvsurgeonError: The passes or the verifier fail.
        """
        stated = self.stated
        subject = Subject.of(self.source)
        reference = reference_of(subject)
        run = note_unreadable(stated.pipeline.run(subject))
        self._check_model(run)
        repeated = self._verify(reference, run, stated.effort, stated.seed)
        original = {name: stated.predicate["original"][name] for name in ("location", "files")}  # checked before
        again = {"original": original, **predicate_of(run, stated.pipeline, repeated)}
        _check_equal(_without_figures(stated.predicate), _without_figures(again))
        _check_figures(stated.predicate["measurements"], again["measurements"])
        fresh = self._verify(reference, run, "thorough" if stated.effort == "thorough" else "normal", None)
        obligations = tuple(obligation for proof in run.proofs for obligation in proof.obligations)
        return {"obligations": obligations, "repeated": repeated, "fresh": fresh}

    def _check_model(self, run: PipelineRun) -> None:
        """Check that the passes give the graph, the weights and the side files of the model.

        Raises:
            CertificateError: They do not.
        """
        model = io.load(self.path)
        part = different_part(run.model, model, self.digests)
        if part is not None:
            raise CertificateError(f"the passes of the certificate give another model: {part} differs")
        _, *others = self.stated.subject
        side_files = set(others) - model_files(model, self.path).keys()
        expected = side_files_of(run.model, self.source)
        in_place = self.path.parent.samefile(self.source.parent)
        for name in side_files:
            if name not in expected or not (in_place or self._digest(expected[name]) == self.stated.subject[name]):
                raise CertificateError(f"`{name}` is neither a file of the model nor a side file of the original")

    def _digest(self, content: Path | str) -> str:
        return self.digests.of(content) if isinstance(content, Path) else hashlib.sha256(content.encode()).hexdigest()

    def _verify(self, reference: onnx.ModelProto, run: PipelineRun, effort: Effort, seed: int | None) -> Report:
        """Verify the model against the original.

        Raises:
            CertificateError: The verdict is not "same".
        """
        from kvsurgeon.workflow.verification import verify_models  # onnxruntime is slow to import

        reference = renamed_reference(reference, run)
        report = verify_models(
            reference, self.path, folder=run.folder, effort=effort, seed=seed, thresholds=run.thresholds,
            progress=self.progress,
        )  # fmt: skip
        if not report.ok:
            raise CertificateError(
                f"the verification of the model fails: {first_of(report.problems)}; seed {report.seed}"
            )
        return report


def _other_versions(predicate: Mapping[str, Any]) -> str | None:
    """Return which versions of packages differ from those of a certificate; None if none does.

    Raises:
        CertificateError: The certificate does not state them.
    """
    stated, installed = predicate.get("tool"), tool()
    if not isinstance(stated, dict) or not isinstance(stated.get("versions"), dict):
        raise CertificateError("the certificate does not state the versions of the tool")
    _check_equal(
        {**stated, "versions": sorted(stated["versions"])},
        {**installed, "versions": sorted(installed["versions"])},
        "tool",
    )
    pairs = ((name, stated["versions"][name], found) for name, found in installed["versions"].items())
    others = [f"{name} {expected}, found {found}" for name, expected, found in pairs if expected != found]
    return f"the certificate was made with other versions: expected {'; '.join(others)}" if others else None


def _check_equal(stated: Any, found: Any, at: str = "predicate") -> None:
    """Check that two JSON values are equal.

    Raises:
        CertificateError: They are not; the message names the first difference.
    """
    if isinstance(stated, dict) and isinstance(found, dict) and stated.keys() == found.keys():
        for key in stated:
            _check_equal(stated[key], found[key], f"{at}.{key}")
    elif isinstance(stated, list) and isinstance(found, list):
        for index, (one, other) in enumerate(zip(stated, found, strict=False)):
            _check_equal(one, other, f"{at}[{index}]")
        _check_equal(len(stated), len(found), f"number of {at}")
    elif type(stated) is not type(found) or isinstance(stated, dict) or stated != found:
        raise CertificateError(
            f"the certificate does not hold; expected {_short(stated)}, found {_short(found)} - at `{at}`"
        )


def _short(value: Any) -> str:
    text = json.dumps(list(value) if isinstance(value, dict) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _without_figures(predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return a predicate without the tool, and without the figures that differ by machine."""
    copy: dict[str, Any] = json.loads(json.dumps({**predicate, "tool": None}))
    measurements = copy["measurements"]
    del measurements["bound"]
    for text in measurements["texts"]:
        del text["error"], text["agreement"]
    measurements["notes"] = [_NUMBER.sub("#", note) for note in measurements["notes"]]
    return copy


def _check_figures(stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Check that all errors are within both bounds, and the bounds of one magnitude.

    Raises:
        CertificateError: They are not.
    """
    bound, required = stated["bound"], found["required_agreement"]
    _check_within("bound", bound, found["bound"] / _OTHER_MACHINE, found["bound"] * _OTHER_MACHINE)
    for one, again in zip(stated["texts"], found["texts"], strict=True):
        if again["verdict"] != "same":  # not compared
            _check_equal([one["error"], one["agreement"]], [None, None], one["scenario"])
            continue
        _check_within(f"error of {one['scenario']}", one["error"], 0.0, bound)
        _check_within(f"error of {one['scenario']}", again["error"], 0.0, bound)
        _check_within(f"agreement of {one['scenario']}", one["agreement"], required, 1.0)


def _check_within(what: str, number: Any, least: float, most: float) -> None:
    if type(number) is not float or not least <= number <= most:
        raise CertificateError(f"{what}: expected a number from {least:.2g} to {most:.2g}, found {_short(number)}")
