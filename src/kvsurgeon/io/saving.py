"""Save a model whole or not at all, with what it needs beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from kvsurgeon.errors import InputError, UsageError, WeightsError
from kvsurgeon.io.atomic import remove_stale, replacing
from kvsurgeon.io.carry import Sharing, carry_side_files, carry_weights, write_side_files
from kvsurgeon.io.embedding import must_unload, unloaded
from kvsurgeon.io.fidelity import to_proto
from kvsurgeon.io.loading import loaded_from
from kvsurgeon.io.locate import find_model
from kvsurgeon.io.progress import Report, reporting
from kvsurgeon.io.renaming import numbered, rename_locations, renamed
from kvsurgeon.io.weights import WeightFile, external_tensors, files_of, is_relative_location


def save(
    model: ir.Model,
    destination: str | Path,
    *,
    source: str | Path | None = None,
    sharing: Sharing = "link",
    progress: Report | None = None,
    home: str | Path | None = None,
    beside: Mapping[str, str] | None = None,
    data: str | None = None,
) -> Path:
    """Return the path at which the model now stands, complete, its weights and side files beside it.

    Data files are written first and the model last, to a temporary file that then takes its name: a killed process
    leaves the old model or the new one. The model itself is not changed.

    Args:
        model: The model; its external data stays in the files where it is.
        destination: An .onnx file, or a folder, in which the model then bears the name of its source.
        source: The file or folder that the model came from, if `load` did not read it from there; config, tokenizer
            and other side files travel along from it.
        sharing: How external data gets into another folder. "link" takes no room and no time, where one file
            system holds both; yet `onnx.load` and `onnx.checker` (1.21 or later) refuse data files with several
            links, those of the source included, while onnxruntime reads them. "copy" costs what it says.
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
    files = _resolved_weights(model, target.parent)
    fresh = None if data is None else numbered(data)
    names = {} if fresh is None else dict(zip((file.location for file in files), fresh, strict=False))
    folder = target.parent if home is None else Path(home).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        with reporting(progress) as report:
            carry_weights(renamed(files, names), target.parent, sharing, report)
            carry_side_files(_side_folders(origin, source, folder), folder, without=frozenset(beside or ()))
            write_side_files(beside or {}, folder)
            own = None if fresh is None else next(fresh)
            with unloaded(model, target, report, own) if must_unload(model) else nullcontext():
                _write(model, target, names)
    except OSError as error:
        raise UsageError(f"cannot write to `{target.parent}`: {error.strerror or error}") from error
    return target


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


def _resolved_weights(model: ir.Model, folder: Path) -> tuple[WeightFile, ...]:
    """Return the data files of the model; those of a proto loaded without its folder must be at the destination."""
    tensors = list(external_tensors(model))
    for tensor in tensors:
        if not is_relative_location(str(tensor.location)):
            raise WeightsError(
                f"expected a location inside the model's folder, found `{tensor.location}` - at `{tensor.name}`"
            )
        if not tensor.base_dir and not (folder / tensor.location).is_file():
            raise WeightsError(
                f"expected external data in `{folder / tensor.location}`, found no such file - at `{tensor.name}`; "
                "load the model with the folder of its data"
            )
    return files_of(tensor for tensor in tensors if tensor.base_dir)


def _side_folders(origin: Path | None, source: str | Path | None, folder: Path) -> Iterator[Path]:
    """Yield the folders whose side files travel along: that of the model and, for `onnx/model.onnx`, the one above."""
    if origin is None:
        return
    homes = [origin.parent]
    if origin.parent.name == "onnx":
        homes.append(origin.parent.parent)
    if not any(home.resolve() == folder.resolve() for home in homes):
        yield from homes


def _write(model: ir.Model, target: Path, names: Mapping[str, str]) -> None:
    try:
        proto = to_proto(model)
        if names:
            rename_locations(proto, names)
        serialized = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise UsageError(
            f"expected a graph of at most 2 GiB at `{target}`, found more: constants inside its nodes are too large"
        ) from error
    with replacing(target) as file:
        file.write(serialized)
