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
from kvsurgeon.errors import Refused, UsageError
from kvsurgeon.io.carry import Sharing
from kvsurgeon.io.config import changes_of, followed
from kvsurgeon.passes.contract import Source, Subject
from kvsurgeon.pipeline import Pipeline, Watch
from kvsurgeon.surgery import Surgery, operate
from kvsurgeon.targets import TARGETS, Facts, Obstacle, Target, facts_of, obstacles

if TYPE_CHECKING:
    from kvsurgeon.parity import Progress


@dataclass(frozen=True, kw_only=True)
class Delivery(Surgery):
    """What was done to a model for a target.

    Attributes:
        target: What it was done for.
        remarks: What its user should know, though nothing stands in the way.
    """

    target: Target
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
    sharing: Sharing = "link",
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
        sharing: How external data gets into another folder; see `kvsurgeon.save`.
        pack: Whether all weights go into one new data file; see `kvsurgeon.save`.
        options: Fields of the pass that puts the cache in, where they are to be others than the target's.
        watch: See `Pipeline.run`.
        progress: Told by the judge before each trial.

    Raises:
        UsageError: There is no such target, or the destination is a file.
        InputError: The model cannot be read.
        Refused: The model cannot be handled soundly, or something stands between it and the target.
        ParityError: The result does not compute what the original computes; nothing was written.
    """
    target = _resolved(target, options)
    if destination is not None and Path(destination).suffix == ".onnx":
        raise UsageError(f"expected a folder, as target {target.name} takes one, found the file `{destination}`")
    subject = Subject.of(source, folder)
    if destination is not None:
        _check_apart(subject, Path(destination), target)
    decoder = _decoder(subject)
    surgery = operate(
        subject.model, Pipeline(target.passes), folder=subject.folder, verify=verify, watch=watch, progress=progress
    )
    finished = Pipeline(target.finish).run(surgery.model, folder=subject.folder, watch=watch)
    facts = _facts(finished.model, target, decoder, subject)
    found = obstacles(target, facts)
    _stop_at(found, target)
    path = None
    if destination is not None:
        origin = source if isinstance(source, str | Path) else None
        path = io.save(
            finished.model,
            Path(destination) / target.file,
            source=origin,
            sharing=sharing,
            pack=pack,
            home=destination,
            beside=_side_files(target, facts),
            data=target.data,
        )
    return Delivery(
        model=finished.model,
        steps=(*surgery.steps, *finished.steps),
        sameness=surgery.sameness,
        path=path,
        target=target,
        remarks=found + tuple(_missing(target, subject.folder)),
    )


def stands_between(source: Source, target: Target | str, *, folder: str | Path | None = None) -> tuple[Obstacle, ...]:
    """Return what stands between a model and a target; nothing is judged or written.

    Raises:
        UsageError: There is no such target.
        InputError: The model cannot be read.
    """
    target = _resolved(target, None)
    subject = Subject.of(source, folder)
    try:
        decoder = _decoder(subject)
        result = Pipeline((*target.passes, *target.finish)).run(subject.model, folder=subject.folder)
    except Refused as error:
        return (Obstacle(what=str(error)),)
    facts = _facts(result.model, target, decoder, subject)
    return obstacles(target, facts) + tuple(_missing(target, subject.folder))


def _check_apart(subject: Subject, destination: Path, target: Target) -> None:
    """Leave quietly unless the folder would hold two models, the one that was and the one that is.

    Raises:
        UsageError: The destination holds the source under another name than the target's.
    """
    origin = io.loaded_from(subject.model)
    if origin is None or origin.resolve() == (destination / target.file).resolve():
        return
    if origin.resolve().parent in (destination.resolve(), (destination / target.file).resolve().parent):
        raise UsageError(
            f"expected a folder beside the source's, as target {target.name} takes `{target.file}` and would find "
            f"`{origin.name}` there too, found `{destination}`; write to another folder"
        )


def _resolved(target: Target | str, options: Mapping[str, Any] | None) -> Target:
    target = TARGETS.find(target).load() if isinstance(target, str) else target
    return replace(target, cache=replace(target.cache, **options)) if options else target


def _decoder(subject: Subject) -> Decoder | None:
    return subject.decoder()


def _facts(model: ir.Model, target: Target, decoder: Decoder | None, subject: Subject) -> Facts:
    config = followed(subject.config or {}, changes_of(model))
    return facts_of(model, target.cache, decoder=decoder, config=config)


def _stop_at(found: tuple[Obstacle, ...], target: Target) -> None:
    """Leave quietly if nothing stops the target.

    Raises:
        Refused: Something does.
    """
    stopping = [obstacle for obstacle in found if obstacle.stops]
    if stopping:
        more = f" (and {len(stopping) - 1} more; inspect --target {target.name} lists them)" if stopping[1:] else ""
        first = stopping[0]
        raise Refused(f"target {target.name}: {first.what}{more}", at=first.at, hint=first.hint)


def _side_files(target: Target, facts: Facts) -> dict[str, str]:
    written = {side_file.name: side_file.write(facts) for side_file in target.side_files}
    return {
        name: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for name, content in written.items()
        if content is not None
    }


def _missing(target: Target, folder: Path | None) -> list[Obstacle]:
    """Return which files the client will miss; they may lie in the folder above `onnx/`."""
    homes = [] if folder is None else [folder, *([folder.parent] if folder.name == "onnx" else [])]
    return [
        Obstacle(
            what=f"expected {name} beside the source, found none: {target.name} will want it", at=name, stops=False
        )
        for name in target.beside
        if not any((home / name).is_file() for home in homes)
    ]
