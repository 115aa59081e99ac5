"""Build the folder of a target: inject the cache, verify the model, check it, and write it with its side files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.anatomy import Decoder
from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.io.json_files import read_json
from kvsurgeon.io.loading import Source
from kvsurgeon.io.model_config import head_changes, updated_config
from kvsurgeon.io.side_files import side_file_folders
from kvsurgeon.passes.contract import Companion, Subject
from kvsurgeon.passes.shapes.fix_shapes import FixShapes
from kvsurgeon.targets import TARGETS, Incompatibility, ModelInfo, Target, find_incompatibilities
from kvsurgeon.targets.target import EMBEDDING, ENCODER, VISION, warning
from kvsurgeon.workflow.companions import appended
from kvsurgeon.workflow.pipeline import PassResult, Pipeline, PipelineRun
from kvsurgeon.workflow.run_and_save import note_unreadable, reference_of, verify_run

if TYPE_CHECKING:
    from kvsurgeon.parity import Effort, Progress


_PARTS = {ENCODER: "the encoder", EMBEDDING: "the embedding of token ids", VISION: "the vision encoder"}
_CHAT_TEMPLATE = "chat_template.jinja"  # as transformers writes it


@dataclass(frozen=True, kw_only=True, repr=False)
class TargetResult(PipelineRun):
    """The result of `build_target`.

    Attributes:
        target: The target, for the text length that was chosen.
        models: The model of each file of the folder, by file name; `model` is the first of them.
        warnings: Incompatibilities that do not prevent the target from loading the model.
    """

    target: Target
    models: Mapping[str, ir.Model]
    warnings: tuple[Incompatibility, ...] = ()

    def save(self, destination: str | Path, **options: Any) -> Path:
        """Raise an error: the folder of a target is written by `build_target`, with the files that go with the model.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"expected the folder of target {self.target.name} as the destination of inject, found none")

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the passes and warnings of the target for the user."""
        return (*super().notes, *map(str, self.warnings))


def build_target(
    source: Subject | Source,
    target: Target | str,
    destination: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    verify: bool = True,
    link_weights: bool = False,
    pack: bool = False,
    force: bool = False,
    options: Mapping[str, Any] | None = None,
    effort: Effort = "normal",
    seed: int | None = None,
    progress: Progress | None = None,
) -> TargetResult:
    """Inject a cache in the form that `target` expects, verify the model, and write the folder that the target loads.

    Args:
        source: A file, a folder that holds one, or a model in memory.
        target: A target, or the name of one.
        destination: A folder, or the model's file in it that the target loads; None to write nothing.
        folder: The folder of the external data of a model in memory.
        verify: Whether to verify the result against the original.
        link_weights: Whether to link external data instead of copying it; see `kvsurgeon.save`.
        pack: Whether to write all weights to one new data file; see `kvsurgeon.save`.
        force: Whether to replace data files and side files of other content; see `kvsurgeon.save`.
        options: Fields of the injection pass that replace those of the target. `max_length` is the number of tokens
            that a text may have, if the target has such a limit.
        effort: How many texts the verifier compares, and of which lengths.
        seed: Random seed of the texts; None draws one, which the report names.
        progress: Called by the verifier before each scenario.

    Raises:
        UsageError: The target is unknown, or the destination is a file that it does not load.
        InputError: The model cannot be read.
        UnsupportedError: The model cannot be given a cache, or the target cannot load it.
        ParityError: The results of the model differ from those of the original; nothing was written.
    """
    target = TARGETS.find(target).load() if isinstance(target, str) else target
    subject = Subject.of(source, folder)
    if destination is not None:
        destination = _folder(Path(destination), target)
        _check_destination(subject, destination, target)
    reference = reference_of(subject) if verify else None
    run, target, decoder = _inject(subject, target, options or {})
    run = note_unreadable(run)
    if reference is not None:
        run = verify_run(run, reference, effort=effort, seed=seed, progress=progress)
    models, steps = _finish(subject, target)
    parts = _parts(target, subject.folder, run.companions)
    infos = _describe(models, run.model, parts, target, decoder, subject)
    warnings = _check(infos, target, subject.folder)
    _stop_if_blocked(warnings, target)
    path: Path | None = None
    files: tuple[io.WrittenFile, ...] = ()
    if destination is not None:
        origin = source if isinstance(source, str | Path) else subject.folder
        options = {"source": origin, "link_weights": link_weights, "pack": pack, "force": force}
        path, files = _save(models, parts, infos[0], target, destination, **options)
    return TargetResult(
        model=next(iter(models.values())), folder=run.folder, steps=(*run.steps, *steps), path=path, files=files,
        verification=run.verification, loss=run.loss, target=target, models=models, warnings=warnings,
    )  # fmt: skip


def check_target(
    source: Source, target: Target | str, *, folder: str | Path | None = None
) -> tuple[Incompatibility, ...]:
    """Return the incompatibilities of a model with a target; nothing is verified or written.

    Raises:
        UsageError: The target is unknown.
        InputError: The model cannot be read.
    """
    target = TARGETS.find(target).load() if isinstance(target, str) else target
    subject = Subject.of(source, folder)
    try:
        run, target, decoder = _inject(subject, target, {})
        models, _ = _finish(subject, target)
        parts = _parts(target, subject.folder, run.companions)
        infos = _describe(models, run.model, parts, target, decoder, subject)
    except UnsupportedError as error:
        return (Incompatibility(str(error)),)
    return _check(infos, target, subject.folder)


def _folder(destination: Path, target: Target) -> Path:
    """Return the folder of the target at a destination.

    Raises:
        UsageError: The destination is a file that the target does not load.
    """
    if destination.suffix != ".onnx":
        return destination
    if target.variants or not destination.match(target.file):
        raise UsageError(
            f"expected a folder for target {target.name}, or `{target.file}` in one, found the file `{destination}`"
        )
    return destination.parents[len(Path(target.file).parts) - 1]


def _check_destination(subject: Subject, destination: Path, target: Target) -> None:
    """Raise unless the folder will hold one model, either the source or the result.

    Raises:
        UsageError: The folder holds the source under another name than that of the target.
    """
    io.destination_of(subject.model, destination / target.files[0])
    origin = io.loaded_from(subject.model)
    files = [(destination / file).resolve() for file in target.files]
    if origin is None or origin.resolve() in files:
        return
    if origin.resolve().parent in (destination.resolve(), *(file.parent for file in files)):
        raise UsageError(
            f"expected another folder than that of the source, as target {target.name} loads `{target.files[0]}` and "
            f"would find `{origin.name}` there too, found `{destination}`"
        )


def _inject(subject: Subject, target: Target, options: Mapping[str, Any]) -> tuple[PipelineRun, Target, Decoder]:
    """Inject the cache; the facts about the decoder come from the analysis that the injection uses."""
    before = Pipeline(target.before).run(subject)
    decoder = subject.decoder()
    target = _configure(target, options, decoder)
    run = Pipeline((target.cache, *target.after)).run(subject)
    return replace(run, steps=(*before.steps, *run.steps)), target, decoder


def _configure(target: Target, options: Mapping[str, Any], decoder: Decoder) -> Target:
    """Return the target with the options of the caller, for texts of the length that these or the model allow.

    Raises:
        UnsupportedError: The model does not support texts of the length of the options.
    """
    fields = dict(options)
    if target.max_length is None:
        return replace(target, cache=replace(target.cache, **fields))
    limit = decoder.max_length
    length = fields.pop("max_length", None)
    if length is None:
        length = target.max_length if limit is None else min(target.max_length, limit)
    elif limit is not None and length > limit:
        raise UnsupportedError(
            f"target {target.name}: the model does not support texts of that length", code=Code.LENGTH_LIMIT,
            expected=f"max-length of at most {limit}", found=str(length),
        )  # fmt: skip
    return replace(target, cache=replace(target.cache, **fields)).with_max_length(length)


def _finish(subject: Subject, target: Target) -> tuple[dict[str, ir.Model], tuple[PassResult, ...]]:
    """Run the passes after verification; return the model of each file, and the result of each pass."""
    run = Pipeline(target.finish).run(subject)
    if not target.variants or target.max_length is None:
        return {target.file: run.model}, run.steps
    models, steps = {}, run.steps
    for file, tokens in target.variants.items():
        fixed = FixShapes(tokens=max(1, min(tokens, target.max_length // 2)), max_length=target.max_length)
        variant = Pipeline((fixed,)).run(run.model, folder=subject.folder)
        models[file] = variant.model
        steps += variant.steps
    return models, steps


def _parts(target: Target, folder: Path | None, companions: Mapping[str, Companion]) -> dict[str, ir.Model]:
    """Return the further models of the target; the encoder also computes what the companions of the decoder do.

    Raises:
        UnsupportedError: One is not next to the decoder, or the companions cannot be added to the encoder.
        InputError: One cannot be read.
    """
    parts: dict[str, ir.Model] = {}
    for name in target.parts:
        path = _find_source_file(folder, name)
        if path is None:
            raise UnsupportedError(
                f"target {target.name}: {_PARTS[name]} is not next to the decoder", code=Code.TARGET,
                expected=f"`{name}`", hint="export it to a file of this name",
            )  # fmt: skip
        parts[name] = appended(io.load(path), companions if name == ENCODER else {})
    return parts


def _describe(
    models: Mapping[str, ir.Model],
    injected: ir.Model,
    parts: Mapping[str, ir.Model],
    target: Target,
    decoder: Decoder,
    subject: Subject,
) -> list[ModelInfo]:
    facts: dict[str, Any] = {
        "parts": {name: ModelInfo.of(part, target.cache) for name, part in parts.items()},
        "decoder": decoder,
        "config": updated_config(subject.config or {}, head_changes(injected)),
        "source_files": _read_source_files(target, subject.folder),
        "chat_template": _read_chat_template(subject.folder),
        "token_limit": target.max_length,
    }
    return [ModelInfo.of(model, target.cache, **facts) for model in models.values()]


def _check(infos: Sequence[ModelInfo], target: Target, folder: Path | None) -> tuple[Incompatibility, ...]:
    """Return the incompatibilities of all files with the target, and warnings of missing source files."""
    found = dict.fromkeys(one for info in infos for one in find_incompatibilities(target, info))
    missing = (name for name in target.required_files if _find_source_file(folder, name) is None)
    reason = f"expected a file of the source that {target.name} requires, found none"
    return (*found, *(warning(reason, at=name) for name in missing))


def _stop_if_blocked(found: Sequence[Incompatibility], target: Target) -> None:
    blocking = [one for one in found if one.blocking]
    if blocking:
        more = f" (and {len(blocking) - 1} more; inspect --target {target.name} lists them)" if blocking[1:] else ""
        first = blocking[0]
        raise UnsupportedError(
            f"target {target.name}: {first.reason}{more}", code=Code.TARGET, at=first.at, hint=first.hint
        )


def _save(
    models: Mapping[str, ir.Model],
    parts: Mapping[str, ir.Model],
    info: ModelInfo,
    target: Target,
    destination: Path,
    **options: Any,
) -> tuple[Path, tuple[io.WrittenFile, ...]]:
    """Write the folder; return the path of the model file, or of the folder if it holds several, and all files."""
    contents = {name: writer(info) for name, writer in target.side_files.items()}
    side_files = {
        name: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for name, content in contents.items()
        if content is not None
    }
    options |= {"side_files": side_files, "data": target.data}
    if target.variants:
        return destination, io.save_variants(models, destination, **options)
    path = destination / target.file
    models = {path.name: models[target.file]}
    models |= {Path(target.parts[name]).name: part for name, part in parts.items()}
    return path, io.save_variants(models, path.parent, side_files_folder=destination, **options)


def _find_source_file(folder: Path | None, name: str) -> Path | None:
    """Return a file in the folder of the source, or in the folder above `onnx/`."""
    return next((one / name for one in side_file_folders(folder) if (one / name).is_file()), None)


def _read_source_files(target: Target, folder: Path | None) -> dict[str, Mapping[str, Any]]:
    """Return the contents of the source's files that the side files replace, if they are JSON objects."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in target.side_files:
        path = _find_source_file(folder, name)
        try:
            content = None if path is None else read_json(path)
        except ValueError:
            continue
        if isinstance(content, dict):
            found[name] = content
    return found


def _read_chat_template(folder: Path | None) -> str | None:
    """Return the chat template of the source, if it is in a separate file."""
    path = _find_source_file(folder, _CHAT_TEMPLATE)
    try:
        return None if path is None else path.read_text("utf-8")
    except (OSError, ValueError):
        return None
