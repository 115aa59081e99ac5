"""A model brought to a target: judged, held against what the target wants, and written as a folder that it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.anatomy import Decoder
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.io.model_config import head_changes, updated_config
from kvsurgeon.io.side_files import LinkMode
from kvsurgeon.passes.contract import Source, Subject
from kvsurgeon.targets import TARGETS, Facts, Obstacle, Target, facts_of, obstacles
from kvsurgeon.workflow.pipeline import PassResult, Pipeline, Watch
from kvsurgeon.workflow.surgery import Surgery, operate

if TYPE_CHECKING:
    from kvsurgeon.parity import Progress


@dataclass(frozen=True, kw_only=True)
class Delivery(Surgery):
    """What was done to a model for a target.

    Attributes:
        target: What it was done for, for texts of the length that came out.
        models: Each file of the folder that holds the model, by its name; `model` is the first of them.
        remarks: What its user should know, though nothing stands in the way.
    """

    target: Target
    models: Mapping[str, ir.Model]
    remarks: tuple[Obstacle, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the passes and the target want a reader to know."""
        return (*super().notes, *map(str, self.remarks))


def deliver(
    source: Source,
    target: Target | str,
    destination: str | Path | None = None,
    *,
    folder: str | Path | None = None,
    verify: bool = True,
    link_mode: LinkMode = "link",
    pack: bool = False,
    options: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> Delivery:
    """Give the model a cache as `target` wants it, judge it, and write the folder that the target takes.

    Args:
        source: A file, a folder that holds one, or a model in memory.
        target: A target, or the name of one.
        destination: A folder; None to write nothing.
        folder: Where the external data of a model in memory lies.
        verify: Whether the judge runs the result against the original.
        link_mode: How external data gets into another folder; see `kvsurgeon.save`.
        pack: Whether all weights go into one new data file; see `kvsurgeon.save`.
        options: Fields of the pass that puts the cache in, where they are to be others than the target's. `max_length`
            is how many tokens a text may have where the target asks for such a number.
        watch: See `Pipeline.run`.
        progress: Told by the judge before each trial.

    Raises:
        UsageError: There is no such target, or the destination is a file.
        InputError: The model cannot be read.
        UnsupportedError: The model cannot be handled soundly, or something stands between it and the target.
        ParityError: The result does not compute what the original computes; nothing was written.
    """
    target = TARGETS.find(target).load() if isinstance(target, str) else target
    if destination is not None and Path(destination).suffix == ".onnx":
        raise UsageError(f"expected a folder, as target {target.name} takes one, found the file `{destination}`")
    subject = Subject.of(source, folder)
    if destination is not None:
        _check_apart(subject, Path(destination), target)
    decoder = subject.decoder()
    target = _fitted(target, options or {}, decoder)
    surgery = operate(
        subject.model, Pipeline(target.passes), folder=subject.folder, verify=verify, watch=watch, progress=progress
    )
    finished = _finished(surgery.model, target, decoder, subject, watch)
    _stop_at(finished.found, target)
    path = None
    if destination is not None:
        origin = source if isinstance(source, str | Path) else None
        path = _written(finished, target, Path(destination), source=origin, link_mode=link_mode, pack=pack)
    return Delivery(
        model=next(iter(finished.models.values())),
        models=finished.models,
        steps=(*surgery.steps, *finished.steps),
        sameness=surgery.sameness,
        path=path,
        target=target,
        remarks=finished.found + tuple(_missing(target, subject.folder)),
    )


def stands_between(source: Source, target: Target | str, *, folder: str | Path | None = None) -> tuple[Obstacle, ...]:
    """Return what stands between a model and a target; nothing is judged or written.

    Raises:
        UsageError: There is no such target.
        InputError: The model cannot be read.
    """
    target = TARGETS.find(target).load() if isinstance(target, str) else target
    subject = Subject.of(source, folder)
    try:
        decoder = subject.decoder()
        target = _fitted(target, {}, decoder)
        result = Pipeline(target.passes).run(subject.model, folder=subject.folder)
        found = _finished(result.model, target, decoder, subject).found
    except UnsupportedError as error:
        return (Obstacle(what=str(error)),)
    return found + tuple(_missing(target, subject.folder))


def _check_apart(subject: Subject, destination: Path, target: Target) -> None:
    """Leave quietly unless the folder would hold two models, the one that was and the one that is.

    Raises:
        UsageError: The destination holds the source under another name than the target's.
    """
    origin = io.loaded_from(subject.model)
    places = [(destination / file).resolve() for file in target.files]
    if origin is None or origin.resolve() in places:
        return
    if origin.resolve().parent in (destination.resolve(), *(place.parent for place in places)):
        raise UsageError(
            f"expected a folder beside the source's, as target {target.name} takes `{target.files[0]}` and would find "
            f"`{origin.name}` there too, found `{destination}`; write to another folder"
        )


def _fitted(target: Target, options: Mapping[str, Any], decoder: Decoder) -> Target:
    """Return the target with the caller's options, for texts as long as asked for, or as usual and as can be.

    Raises:
        UnsupportedError: The model cannot be run on texts as long as asked for.
    """
    fields = dict(options)
    if target.max_length is None:
        return replace(target, cache=replace(target.cache, **fields))
    longest = decoder.max_length
    wanted = fields.pop("max_length", None)
    if wanted is not None and longest is not None and wanted > longest:
        raise UnsupportedError(
            f"target {target.name}: the model cannot be run on texts of so many tokens",
            expected=f"max-length of at most {longest}", found=str(wanted),
        )  # fmt: skip
    usual = target.max_length if longest is None else min(target.max_length, longest)
    return replace(target, cache=replace(target.cache, **fields)).of_length(usual if wanted is None else wanted)


@dataclass(frozen=True, kw_only=True)
class _Finished:
    """What a target's folder will hold."""

    models: Mapping[str, ir.Model]  # by file
    steps: tuple[PassResult, ...]
    facts: Facts  # of the first
    found: tuple[Obstacle, ...]  # about any of them


def _finished(
    model: ir.Model, target: Target, decoder: Decoder, subject: Subject, watch: Watch | None = None
) -> _Finished:
    """Run what is not judged, once for each file, and hold each against what the target wants."""
    results = {target.file: Pipeline(target.finish).run(model, folder=subject.folder, watch=watch)}
    steps = results[target.file].steps
    if target.variants and target.max_length is not None:
        whole = results[target.file].model
        results = {
            variant.file: Pipeline((variant.fixed(target.max_length),)).run(whole, folder=subject.folder, watch=watch)
            for variant in target.variants
        }
        steps += tuple(step for result in results.values() for step in result.steps)
    config = updated_config(subject.config or {}, head_changes(model))
    facts = [
        replace(
            facts_of(one.model, target.cache, decoder=decoder, config=config, room=target.max_length),
            beside=_beside(target, subject.folder),
        )
        for one in results.values()
    ]
    found = dict.fromkeys(obstacle for one in facts for obstacle in obstacles(target, one))
    return _Finished(
        models={file: one.model for file, one in results.items()}, steps=steps, facts=facts[0], found=tuple(found)
    )


def _written(
    finished: _Finished,
    target: Target,
    destination: Path,
    *,
    source: str | Path | None,
    link_mode: LinkMode,
    pack: bool,
) -> Path:
    """Write the folder, and return where the model stands: its file, or the folder where it has several."""
    beside = _side_files(target, finished.facts)
    if target.variants:
        return io.save_variants(
            finished.models,
            destination,
            source=source,
            link_mode=link_mode,
            pack=pack,
            side_files=beside,
            data=target.data,
        )
    return io.save(
        finished.models[target.file],
        destination / target.file,
        source=source,
        link_mode=link_mode,
        pack=pack,
        side_files_folder=destination,
        side_files=beside,
        data=target.data,
    )


def _stop_at(found: tuple[Obstacle, ...], target: Target) -> None:
    """Leave quietly if nothing stops the target.

    Raises:
        UnsupportedError: Something does.
    """
    stopping = [obstacle for obstacle in found if obstacle.stops]
    if stopping:
        more = f" (and {len(stopping) - 1} more; inspect --target {target.name} lists them)" if stopping[1:] else ""
        first = stopping[0]
        raise UnsupportedError(f"target {target.name}: {first.what}{more}", at=first.at, hint=first.hint)


def _side_files(target: Target, facts: Facts) -> dict[str, str]:
    written = {side_file.name: side_file.write(facts) for side_file in target.side_files}
    return {
        name: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for name, content in written.items()
        if content is not None
    }


def _missing(target: Target, folder: Path | None) -> list[Obstacle]:
    """Return which files the client will miss; they may lie in the folder above `onnx/`."""
    return [
        Obstacle(
            what=f"expected {name} beside the source, found none: {target.name} will want it", at=name, stops=False
        )
        for name in target.beside
        if _file_beside(folder, name) is None
    ]


def _file_beside(folder: Path | None, name: str) -> Path | None:
    homes = [] if folder is None else [folder, *([folder.parent] if folder.name == "onnx" else [])]
    return next((home / name for home in homes if (home / name).is_file()), None)


def _beside(target: Target, folder: Path | None) -> dict[str, Mapping[str, Any]]:
    """Return what the source has under the names of the target's side files; what is no JSON object is left out."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in (side_file.name for side_file in target.side_files):
        path = _file_beside(folder, name)
        try:
            said = None if path is None else json.loads(path.read_text("utf-8"))
        except ValueError:
            continue
        if isinstance(said, dict):
            found[name] = said
    return found
