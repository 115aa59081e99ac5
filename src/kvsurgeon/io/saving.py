"""Save a model whole or not at all, with what it needs beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from kvsurgeon.errors import InputError, UsageError, WeightsError
from kvsurgeon.io.atomic_write import Draft, drafting, remove_stale
from kvsurgeon.io.data_file import free_name, leaving, shared_or_leaving, unloaded
from kvsurgeon.io.external_data import WeightFile, external_tensors, files_of, is_relative_location
from kvsurgeon.io.loading import loaded_from
from kvsurgeon.io.locate import find_model
from kvsurgeon.io.model_config import changes_of
from kvsurgeon.io.progress import Report, reporting
from kvsurgeon.io.renaming import numbered, rename_locations, renamed
from kvsurgeon.io.roundtrip import to_proto
from kvsurgeon.io.side_files import (
    CONFIG,
    CONFIGS,
    LinkMode,
    carry_config,
    carry_side_files,
    carry_weights,
    write_side_files,
)


def save(
    model: ir.Model,
    destination: str | Path,
    *,
    source: str | Path | None = None,
    link_mode: LinkMode = "link",
    pack: bool = False,
    progress: Report | None = None,
    home: str | Path | None = None,
    beside: Mapping[str, str] | None = None,
    data: str | None = None,
) -> Path:
    """Return the path at which the model now stands, complete, its weights and side files beside it.

    Weights that are to be computed are, one at a time and chunk by chunk, into a new data file beside those that are
    as they were. All files are written first and named last, the model after what it refers to: a killed process
    leaves the old model or the new one, whole, and nothing else. The model itself is not changed.

    Args:
        model: The model; its external data stays in the files where it is.
        destination: An .onnx file, or a folder, in which the model then bears the name of its source.
        source: The file or folder that the model came from, if `load` did not read it from there; config, tokenizer
            and other side files travel along from it, and the config follows what passes made of the heads.
        link_mode: How external data gets into another folder. "link" takes no room and no time, where one file
            system holds both; yet `onnx.load` and `onnx.checker` (1.21 or later) refuse data files with several
            links, those of the source included, while onnxruntime reads them. "copy" costs what it says.
        pack: Whether all weights go into one new data file, which then holds nothing else: data that the model reads
            no more stays behind.
        progress: Called with what is written, bytes done and bytes in all; by default a bar on a terminal.
        home: The folder that side files go to, if it is not the model's own.
        beside: Texts of further side files by their names in that folder; they take the place of those that travel.
        data: Name of the first file of external data; further ones are called `data_1`, `data_2`, ... None to leave
            their names as they are.

    Raises:
        UsageError: The destination cannot be written to, or holds other data under the name of this model's.
        WeightsError: External data is missing.
    """
    origin = find_model(source).absolute() if source is not None else loaded_from(model)
    target = _target(Path(destination).absolute(), origin)
    folder = target.parent if home is None else Path(home).absolute()
    moved = leaving(model, pack=pack)
    _save(
        {target: model}, moved, origin, folder, link_mode=link_mode, progress=progress, beside=beside or {}, data=data
    )
    return target


def save_variants(
    models: Mapping[str, ir.Model],
    destination: str | Path,
    *,
    source: str | Path | None = None,
    link_mode: LinkMode = "link",
    pack: bool = False,
    progress: Report | None = None,
    beside: Mapping[str, str] | None = None,
    data: str | None = None,
) -> Path:
    """Return the folder in which the models now stand under their names, with one set of data files for all of them.

    They are forms of one model: what weights they hold alike lies in a data file once, those that were in memory too.
    All else is as `save` has it.

    Raises:
        UsageError: The destination cannot be written to, or holds other data under the name of these models'.
        WeightsError: External data is missing.
    """
    first = next(iter(models.values()))
    origin = find_model(source).absolute() if source is not None else loaded_from(first)
    folder = Path(destination).absolute()
    placed = {folder / name: model for name, model in models.items()}
    moved = shared_or_leaving(tuple(models.values()), pack=pack)
    _save(placed, moved, origin, folder, link_mode=link_mode, progress=progress, beside=beside or {}, data=data)
    return folder


def _save(
    models: Mapping[Path, ir.Model],
    moved: Sequence[ir.Value],
    origin: Path | None,
    folder: Path,
    *,
    link_mode: LinkMode,
    progress: Report | None,
    beside: Mapping[str, str],
    data: str | None,
) -> None:
    """Write models that stand in one folder, with what lies beside them."""
    target, model = next(iter(models.items()))
    staying = [tensor for one in models.values() for tensor in _staying(one, moved)]
    files = _resolved_weights(staying, target.parent)
    names, own = _data_names(target, files, data)
    try:
        with drafting() as draft, reporting(progress) as report:
            draft.make_folder(target.parent)
            remove_stale(target.parent)
            carry_weights(renamed(files, names), target.parent, link_mode, draft, report)
            _carry_side_files(model, folder, _homes(origin), beside, draft)
            with unloaded(moved, own, draft, report) if moved else nullcontext():
                for place, one in models.items():
                    _write(one, place, names, draft)
    except OSError as error:
        raise UsageError(f"cannot write to `{target.parent}`: {error.strerror or error}") from error


def _target(destination: Path, origin: Path | None) -> Path:
    if destination.suffix == ".onnx" and not destination.is_dir():
        return destination
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"expected an .onnx file or a folder as destination, found the file `{destination}`")
    if origin is None:
        return destination / "model.onnx"
    return origin if _holds(destination, origin) else destination / origin.name


def _holds(folder: Path, origin: Path) -> bool:
    """Return whether the origin is the model that the folder stands for, be it `onnx/model.onnx` in it."""
    try:
        return find_model(folder).samefile(origin)
    except (InputError, OSError):
        return False


def _staying(model: ir.Model, moved: Collection[ir.Value]) -> list[ir.ExternalTensor]:
    """Return the external tensors that stay in the files where they are."""
    gone = {id(value.const_value) for value in moved}
    return [tensor for tensor in external_tensors(model) if id(tensor) not in gone]


def _resolved_weights(tensors: Iterable[ir.ExternalTensor], folder: Path) -> tuple[WeightFile, ...]:
    """Return the data files of these tensors; those of a proto loaded without its folder must be at the destination."""
    settled = []
    for tensor in tensors:
        if not is_relative_location(str(tensor.location)):
            raise WeightsError(
                f"expected a location inside the model's folder, found `{tensor.location}` - at `{tensor.name}`"
            )
        if tensor.base_dir:
            settled.append(tensor)
        elif not (folder / tensor.location).is_file():
            raise WeightsError(
                f"expected external data in `{folder / tensor.location}`, found no such file - at `{tensor.name}`; "
                "load the model with the folder of its data"
            )
    return files_of(settled)


def _homes(origin: Path | None) -> tuple[Path, ...]:
    """Return where side files lie: in the folder of the model and, for `onnx/model.onnx`, in the one above."""
    if origin is None:
        return ()
    return (origin.parent, *([origin.parent.parent] if origin.parent.name == "onnx" else []))


def _data_names(target: Path, files: Iterable[WeightFile], data: str | None) -> tuple[dict[str, str], Path]:
    """Return the names that files of external data get instead of their own, and a data file for what is new."""
    if data is None:
        return {}, free_name(target, {file.location for file in files})
    fresh = numbered(data)
    names = dict(zip((file.location for file in files), fresh, strict=False))
    return names, target.with_name(next(name for name in fresh if name not in names))


def _carry_side_files(
    model: ir.Model, folder: Path, homes: tuple[Path, ...], beside: Mapping[str, str], draft: Draft
) -> None:
    """Take side files along into another folder, the config as the model is now; where they lie, only the config."""
    described = folder
    if any(home.resolve() == folder.resolve() for home in homes):
        described = next((home for home in homes if (home / CONFIG).is_file()), folder)
    else:
        carry_side_files(homes, folder, draft, without=beside)
    for name in (name for name in CONFIGS if name not in beside):
        carry_config(homes, described, changes_of(model), draft, name)
    write_side_files(beside, folder, draft)


def _write(model: ir.Model, target: Path, names: Mapping[str, str], draft: Draft) -> None:
    try:
        proto = to_proto(model)
        if names:
            rename_locations(proto, names)
        serialized = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise UsageError(
            f"expected a graph of at most 2 GiB at `{target}`, found more: constants inside its nodes are too large"
        ) from error
    with draft.new(target) as file:
        file.write(serialized)
