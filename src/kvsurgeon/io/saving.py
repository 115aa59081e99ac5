"""Save a model atomically, with its data files and side files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from kvsurgeon.errors import InputError, UsageError, WeightsError
from kvsurgeon.io.atomic_write import FileTransaction, file_transaction, remove_stale
from kvsurgeon.io.data_file import weights_to_write, written_to_file
from kvsurgeon.io.external_data import WeightFile, external_tensors, files_of, is_relative_location, rename_locations
from kvsurgeon.io.loading import loaded_from
from kvsurgeon.io.locate import find_model
from kvsurgeon.io.model_config import head_changes
from kvsurgeon.io.progress import OnProgress, progress_bar
from kvsurgeon.io.roundtrip import to_proto
from kvsurgeon.io.side_files import (
    CONFIG,
    CONFIGS,
    LinkMode,
    copy_side_files,
    provide_weights,
    update_config,
    write_side_files,
)


def save(
    model: ir.Model,
    destination: str | Path,
    *,
    source: str | Path | None = None,
    link_mode: LinkMode = "link",
    pack: bool = False,
    progress: OnProgress | None = None,
    side_files_folder: str | Path | None = None,
    side_files: Mapping[str, str] | None = None,
    data: str | None = None,
) -> Path:
    """Save a model with its weights and side files, and return its path.

    Computed weights are computed one at a time, in chunks, into a new data file; other weights stay in their files.
    All files are written first and named last, the model after the files that it refers to: a killed process leaves
    the old model or the new one, complete. The model in memory does not change.

    Args:
        model: The model. Its external data stays in its files.
        destination: An .onnx file, or a folder, in which the model gets the file name of its source.
        source: The file or folder of the original model, if `load` did not read it from there. Its config, tokenizer
            and other side files are copied, with the head counts in the config updated.
        link_mode: How external data gets into another folder. "link" makes hard links, which take no space and no time;
            but `onnx.load` and `onnx.checker` (1.21 or later) reject data files with several links, including those of
            the source, while onnxruntime reads them. "copy" makes copies.
        pack: Whether to write all weights to one new file, without unused ones.
        progress: Called with the file name, bytes done and bytes in total; by default a bar on a terminal.
        side_files_folder: The folder for side files, if it is not that of the model.
        side_files: Texts of further side files by name; they replace copied ones.
        data: Name of the first file of external data; further ones are called `data_1`, `data_2`, ... If None, files
            keep their names.

    Raises:
        UsageError: The destination cannot be written to, or has other data under the name of this model's.
        WeightsError: External data is missing.
    """
    target = _target(Path(destination).absolute(), _origin(model, source))
    save_variants(
        {target.name: model}, target.parent, source=source, link_mode=link_mode, pack=pack, progress=progress,
        side_files_folder=side_files_folder, side_files=side_files, data=data,
    )  # fmt: skip
    return target


def save_variants(
    models: Mapping[str, ir.Model],
    destination: str | Path,
    *,
    source: str | Path | None = None,
    link_mode: LinkMode = "link",
    pack: bool = False,
    progress: OnProgress | None = None,
    side_files_folder: str | Path | None = None,
    side_files: Mapping[str, str] | None = None,
    data: str | None = None,
) -> Path:
    """Save variants of one model under their names, with one set of data files, and return the folder.

    Weights that several variants share are in a data file once, including those that were in memory. The arguments are
    those of `save`; the destination is a folder.

    Raises:
        UsageError: The destination cannot be written to, or has other data under the name of these models'.
        WeightsError: External data is missing.
    """
    folder = Path(destination).absolute()
    name, model = next(iter(models.items()))
    written = weights_to_write(tuple(models.values()), pack=pack)
    replaced = {id(value.const_value) for value in written}
    kept = [tensor for one in models.values() for tensor in external_tensors(one) if id(tensor) not in replaced]
    files = _data_files(kept, folder)
    names, new_file = _data_names(folder / name, files, data)
    renamed = [replace(file, location=names.get(file.location, file.location)) for file in files]
    sources = _side_file_folders(_origin(model, source))
    side_folder = folder if side_files_folder is None else Path(side_files_folder).absolute()
    try:
        with file_transaction() as transaction, progress_bar(progress) as on_progress:
            transaction.make_folder(folder)
            remove_stale(folder)
            provide_weights(renamed, folder, link_mode, transaction, on_progress)
            _save_side_files(model, side_folder, sources, side_files or {}, transaction)
            with written_to_file(written, new_file, transaction, on_progress) if written else nullcontext():
                for file_name, one in models.items():
                    _write(one, folder / file_name, names, transaction)
    except OSError as error:
        raise UsageError(f"cannot write to `{folder}`: {error.strerror or error}") from error
    return folder


def _origin(model: ir.Model, source: str | Path | None) -> Path | None:
    return find_model(source).absolute() if source is not None else loaded_from(model)


def _target(destination: Path, origin: Path | None) -> Path:
    if destination.suffix == ".onnx" and not destination.is_dir():
        return destination
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"expected an .onnx file or a folder as destination, found the file `{destination}`")
    if origin is None:
        return destination / "model.onnx"
    return origin if _is_model_of(destination, origin) else destination / origin.name


def _is_model_of(folder: Path, path: Path) -> bool:
    """Return whether a file is the model of a folder, such as `onnx/model.onnx` in it."""
    try:
        return find_model(folder).samefile(path)
    except (InputError, OSError):
        return False


def _data_files(tensors: Iterable[ir.ExternalTensor], folder: Path) -> tuple[WeightFile, ...]:
    """Return the data files of tensors; those without a base folder must be at the destination already."""
    located = []
    for tensor in tensors:
        if not is_relative_location(str(tensor.location)):
            raise WeightsError(
                f"expected a location in the folder of the model, found `{tensor.location}` - at `{tensor.name}`"
            )
        if tensor.base_dir:
            located.append(tensor)
        elif not (folder / tensor.location).is_file():
            raise WeightsError(
                f"expected external data in `{folder / tensor.location}`, found no such file - at `{tensor.name}`; "
                "load the model with the folder of its data"
            )
    return files_of(located)


def _side_file_folders(origin: Path | None) -> tuple[Path, ...]:
    """Return where the source has side files: in the folder of its model, or above that for `onnx/model.onnx`."""
    if origin is None:
        return ()
    return (origin.parent, *([origin.parent.parent] if origin.parent.name == "onnx" else []))


def _data_names(target: Path, files: Sequence[WeightFile], data: str | None) -> tuple[dict[str, str], Path]:
    """Return new locations of data files by old ones, and the path of a new data file."""
    if data is None:
        taken = {file.location for file in files}
        names = chain([f"{target.name}.data"], (f"{target.name}-{number}.data" for number in count(2)))
        free = (name for name in names if name not in taken and not target.with_name(name).exists())
        return {}, target.with_name(next(free))
    numbered = _numbered(data)
    renamed = dict(zip((file.location for file in files), numbered, strict=False))
    return renamed, target.with_name(next(name for name in numbered if name not in renamed))


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(1))


def _save_side_files(
    model: ir.Model,
    folder: Path,
    sources: tuple[Path, ...],
    side_files: Mapping[str, str],
    transaction: FileTransaction,
) -> None:
    """Copy side files into another folder and update the config; in the folder of the source, only update it."""
    config_folder = folder
    if any(source.resolve() == folder.resolve() for source in sources):
        config_folder = next((source for source in sources if (source / CONFIG).is_file()), folder)
    else:
        copy_side_files(sources, folder, transaction, without=side_files)
    for name in (name for name in CONFIGS if name not in side_files):
        update_config(sources, config_folder, head_changes(model), transaction, name)
    write_side_files(side_files, folder, transaction)


def _write(model: ir.Model, path: Path, names: Mapping[str, str], transaction: FileTransaction) -> None:
    try:
        proto = to_proto(model)
        if names:
            rename_locations(proto, names)
        serialized = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise UsageError(
            f"expected a graph of at most 2 GiB at `{path}`, found more: constants inside its nodes are too large"
        ) from error
    with transaction.create(path) as file:
        file.write(serialized)
