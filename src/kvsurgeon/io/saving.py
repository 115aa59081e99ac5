"""Save a model atomically, with its data files and side files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from kvsurgeon.errors import InputError, UsageError, WeightsError
from kvsurgeon.io.atomic_write import WrittenFile, file_transaction, remove_stale
from kvsurgeon.io.data_file import weights_to_write, written_to_file
from kvsurgeon.io.external_data import WeightFile, external_tensors, files_of, is_relative_location, rename_locations
from kvsurgeon.io.loading import loaded_from
from kvsurgeon.io.locate import find_model
from kvsurgeon.io.model_config import head_changes
from kvsurgeon.io.progress import OnProgress, progress_bar
from kvsurgeon.io.roundtrip import to_proto
from kvsurgeon.io.side_files import FileProvider, find_side_files, side_file_folders, updated_configs
from kvsurgeon.io.stored_weights import StoredTensor, referred_to, stored_tensors
from kvsurgeon.io.wire_format import with_weights


def save(
    model: ir.Model,
    destination: str | Path,
    *,
    source: str | Path | None = None,
    link_weights: bool = False,
    pack: bool = False,
    force: bool = False,
    progress: OnProgress | None = None,
) -> Path:
    """Save a model with its weights and side files, and return its path.

    Computed weights are computed one at a time, in chunks, into a new data file; other weights stay in their files,
    which are copied into another folder. All files are written first and named last, the model after the files that it
    refers to: a killed process leaves the old model or the new one, complete. The model in memory does not change.

    Args:
        model: The model. Its external data stays in its files.
        destination: An .onnx file, or a folder, in which the model gets the file name of its source.
        source: The file or folder of the original model, if `load` did not read it from there. Its config, tokenizer
            and other side files are copied, with the head counts in the config updated.
        link_weights: Whether to make hard links to data files instead of copies, which takes no space and no time; but
            `onnx.load` and `onnx.checker` (1.21 or later) reject data files with several links, including those of the
            source, while onnxruntime reads them.
        pack: Whether to write all weights to one new file, without unused ones.
        force: Whether to replace data files and side files of other content.
        progress: Called with the file name, bytes done and bytes in total; by default a bar on a terminal.

    Raises:
        UsageError: The destination cannot be written to, or has another file under the name of one of this model's.
        InputError: A side file is a link out of its folder.
        WeightsError: External data is missing.
    """
    path = destination_of(model, destination, source=source)
    save_variants(
        {path.name: model}, path.parent, source=source, link_weights=link_weights, pack=pack, force=force,
        progress=progress,
    )  # fmt: skip
    return path


def destination_of(model: ir.Model, destination: str | Path, *, source: str | Path | None = None) -> Path:
    """Return the file that `save` writes a model to; its arguments are those of `save`.

    Raises:
        UsageError: No model can be written there.
    """
    path, origin = Path(destination).absolute(), _origin(model, source)
    try:
        return _target(path, origin)
    except OSError as error:  # such as a name that is too long
        raise UsageError(f"cannot write to `{path}`: {error.strerror or error}") from error


def save_variants(
    models: Mapping[str, ir.Model],
    destination: str | Path,
    *,
    source: str | Path | None = None,
    link_weights: bool = False,
    pack: bool = False,
    force: bool = False,
    progress: OnProgress | None = None,
    side_files_folder: str | Path | None = None,
    side_files: Mapping[str, str] | None = None,
    data: str | None = None,
) -> tuple[WrittenFile, ...]:
    """Save variants of one model under their names, with one set of data files, and return what was written.

    Weights that several variants share are in a data file once, including those that were in memory.

    Args:
        models: The models by file name.
        destination: A folder.
        source: See `save`, as for the following arguments.
        link_weights: Whether to make hard links to data files.
        pack: Whether to write all weights to one new file.
        force: Whether to replace files of other content.
        progress: Called while a file is written.
        side_files_folder: The folder for side files, if it is not that of the model.
        side_files: Texts of further side files by name; they replace those of the source.
        data: Name of the first file of external data; further ones are called `data_1`, `data_2`, ... With {file}, the
            name of a model's file, each model has separate ones. If None, files keep their names.

    Raises:
        UsageError: The destination cannot be written to, or has another file under the name of one of these models'.
        InputError: A side file is a link out of its folder.
        WeightsError: External data is missing.
    """
    folder = Path(destination).absolute()
    side_folder = folder if side_files_folder is None else Path(side_files_folder).absolute()
    sources = frozenset(Path(tensor.path).resolve() for one in models.values() for tensor in external_tensors(one))
    model = next(iter(models.values()))
    try:
        with file_transaction() as transaction, progress_bar(progress) as on_progress:
            provider = FileProvider(
                transaction=transaction, link=link_weights, force=force, kept=sources, on_progress=on_progress
            )
            transaction.make_folder(folder)
            remove_stale(folder)
            groups = [_provide_weights(group, folder, data, provider, pack=pack) for group in _groups(models, data)]
            _save_side_files(model, _origin(model, source), side_folder, side_files or {}, provider)
            for group in groups:
                _write_group(group, folder, provider)
    except OSError as error:
        raise UsageError(f"cannot write to `{folder}`: {error.strerror or error}") from error
    return transaction.written


def _groups(models: Mapping[str, ir.Model], data: str | None) -> list[Mapping[str, ir.Model]]:
    """Return the models that share data files: all, unless data files are named after their model."""
    separate = data is not None and data != data.format(file="")
    return [{name: one} for name, one in models.items()] if separate else [models]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Models with one set of data files.

    Attributes:
        models: The models by file name.
        names: New locations of their data files by old ones.
        written: Weights that are not in a data file yet.
        new_file: The data file for these.
    """

    models: Mapping[str, ir.Model]
    names: Mapping[str, str]
    written: Sequence[ir.Value]
    new_file: Path


def _provide_weights(
    models: Mapping[str, ir.Model], folder: Path, data: str | None, provider: FileProvider, *, pack: bool
) -> _Group:
    """Copy or link the data files of models."""
    written = weights_to_write(tuple(models.values()), pack=pack)
    replaced = {id(value.const_value) for value in written}
    kept = [tensor for one in models.values() for tensor in external_tensors(one) if id(tensor) not in replaced]
    files = _data_files(kept, folder)
    names, new_file = _data_names(folder / next(iter(models)), files, data)
    provider.provide_weights(
        [replace(file, location=names.get(file.location, file.location)) for file in files], folder
    )
    return _Group(models=models, names=names, written=written, new_file=new_file)


def _write_group(group: _Group, folder: Path, provider: FileProvider) -> None:
    """Write weights that are not in a data file yet, and the models."""
    weights = (group.written, group.new_file, provider.transaction, provider.on_progress)
    with written_to_file(*weights) if group.written else nullcontext():
        for file_name, one in group.models.items():
            _write(one, folder / file_name, group.names, provider)


def side_files_of(model: ir.Model, source: Path) -> dict[str, Path | str]:
    """Return the side files that a model gets in another folder than that of its source: a file, or a new text."""
    found = find_side_files(side_file_folders(source.parent), source)
    return {**found, **{path.name: text for path, text in updated_configs(found, head_changes(model))}}


def _origin(model: ir.Model, source: str | Path | None) -> Path | None:
    """Return the file of the original model, which may be missing in a folder of side files; None if not known."""
    if source is None:
        return loaded_from(model)
    try:
        return find_model(source).absolute()
    except InputError:
        if not Path(source).is_dir():
            raise
        return (Path(source) / "model.onnx").absolute()


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


def _data_names(target: Path, files: Sequence[WeightFile], data: str | None) -> tuple[dict[str, str], Path]:
    """Return new locations of data files by old ones, and the path of a new data file."""
    if data is None:
        taken = {file.location for file in files}
        names = chain([f"{target.name}.data"], (f"{target.name}-{number}.data" for number in count(2)))
        free = (name for name in names if name not in taken and not target.with_name(name).exists())
        return {}, target.with_name(next(free))
    numbered = _numbered(data.format(file=target.name))
    renamed = dict(zip((file.location for file in files), numbered, strict=False))
    return renamed, target.with_name(next(name for name in numbered if name not in renamed))


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(1))


def _save_side_files(
    model: ir.Model, origin: Path | None, folder: Path, texts: Mapping[str, str], provider: FileProvider
) -> None:
    """Copy side files into another folder with an updated config; in the folder of the source, only update it."""
    folders = side_file_folders(None if origin is None else origin.parent)
    found = find_side_files(folders, origin)
    configs = {path.name: (path, text) for path, text in updated_configs(found, head_changes(model))}
    if any(one.resolve() == folder.resolve() for one in folders):
        for path, text in (configs[name] for name in configs.keys() - texts.keys()):
            provider.provide_texts({path.name: text}, path.parent)
    else:
        texts = {**{name: text for name, (_, text) in configs.items()}, **texts}
        provider.copy_side_files((file for name, file in found.items() if name not in texts), folder)
    provider.provide_texts(texts, folder)


def _write(model: ir.Model, path: Path, names: Mapping[str, str], provider: FileProvider) -> None:
    if path.resolve() in provider.kept:
        raise UsageError(f"expected another name than that of a data file of the model, found `{path}`")
    stored = {name: (tensor.nbytes, tensor) for name, tensor in stored_tensors(model).items()}
    try:
        with referred_to(model):
            proto = to_proto(model)
        if names:
            rename_locations(proto, names)
        serialized = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise UsageError(
            f"expected a graph of at most 2 GiB at `{path}`, found more: constants inside its nodes are too large"
        ) from error
    with provider.transaction.create(path) as file:
        for part in with_weights(memoryview(serialized), stored.get) if stored else [serialized]:
            if isinstance(part, StoredTensor):
                part.tofile(file)
            else:
                file.write(part)
