"""Load the graph of a model, from a file or from memory, without reading its weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InputError, InvalidModelError, UsageError
from kvsurgeon.io.external_data import ContainedTensor, check_weights, external_tensors
from kvsurgeon.io.gc_pause import gc_paused
from kvsurgeon.io.locate import find_model, parse, read_proto
from kvsurgeon.io.roundtrip import keep_original, root_cause, to_proto
from kvsurgeon.io.stored_weights import WeightsInFile
from kvsurgeon.io.validate import check_model

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Source: TypeAlias = "str | Path | bytes | onnx.ModelProto | ir.Model | gs.Graph"
Runnable = str | Path | onnx.ModelProto

_PATH = "kvsurgeon.path"


def load(source: Source, *, folder: str | Path | None = None) -> ir.Model:
    """Return a model; its nodes are sorted in execution order, and its weights stay in their files.

    Args:
        source: An .onnx file, a folder with one, or a model in memory, which is not changed; an `onnx_ir.Model` is
            returned as it is.
        folder: The folder of the external data of a model in memory. Without it, external data is not checked.

    Raises:
        UsageError: The source is of another type.
        InputError: There is no model at that path.
        InvalidModelError: It is not ONNX, truncated, or its graph is invalid.
        WeightsError: External data is missing, too short or outside the folder of the model.
    """
    source = read_source(source)
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)  # onnx-ir writes the new name of a renamed initializer into its proto
        return _build(proto, None if folder is None else Path(folder), None)
    path = find_model(source).absolute()
    stored = WeightsInFile.of(path)
    proto = read_proto(path, None if stored is None else stored.location)
    try:
        model = _build(proto, path.parent, path, stored)
    except InputError as error:
        raise type(error)(_on_one_line(f"`{path}`: {error}")) from error
    model.meta[_PATH] = path
    return model


def read_source(source: Source) -> Runnable | ir.Model:
    """Return a source as a path, a proto or an `ir.Model`: bytes are parsed, a graph of onnx-graphsurgeon is exported.

    Raises:
        UsageError: The source is of another type.
        InvalidModelError: The bytes are not an ONNX model.
    """
    if isinstance(source, str | Path | onnx.ModelProto | ir.Model):
        return source
    if isinstance(source, os.PathLike):
        return Path(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return parse(memoryview(source), "the model in memory")
    if type(source).__module__.startswith("onnx_graphsurgeon"):
        import onnx_graphsurgeon as gs

        if isinstance(source, gs.Graph):
            exported: onnx.ModelProto = gs.export_onnx(source)
            return exported
    raise UsageError(
        "expected a model: a path, bytes, an onnx.ModelProto, an onnx_ir.Model or an onnx_graphsurgeon.Graph, "
        f"found {type(source).__name__}"
    )


def as_runnable(
    sources: Iterable[Source], folder: str | Path | None = None
) -> tuple[tuple[Runnable, ...], Path | None]:
    """Return sources as onnxruntime opens them, and the folder of the external data of those in memory.

    Args:
        sources: The models, which are not changed.
        folder: The folder of the external data of models in memory; None for that of the file that a model was loaded
            from.

    Raises:
        UsageError: A source is of another type, or models in memory were loaded from several folders.
        InvalidModelError: A model cannot be read or written.
    """
    read = [read_source(source) for source in sources]
    loaded = (loaded_from(model) for model in read if isinstance(model, ir.Model))
    folders = {path.parent for path in loaded if path is not None} if folder is None else {Path(folder)}
    if len(folders) > 1:
        found = " and ".join(sorted(f"`{one}`" for one in folders))
        raise UsageError(f"expected the weights of models in memory in one folder, found {found}; give their paths")
    where = min(folders, default=None)
    return tuple(to_proto(one, where) if isinstance(one, ir.Model) else one for one in read), where


def loaded_from(model: ir.Model) -> Path | None:
    """Return the file that a model was loaded from; None if it was loaded from a proto."""
    path = model.meta.get(_PATH)
    return path if isinstance(path, Path) else None


def _build(
    proto: onnx.ModelProto, folder: Path | None, path: Path | None, stored: WeightsInFile | None = None
) -> ir.Model:
    with gc_paused():
        found = check_model(proto)
        model = _convert(proto)
        if not found.ordered:
            model.graph.sort()
            for function in model.functions.values():
                function.sort()
        if stored is not None and found.external:
            stored.bind(model)
        if folder is not None and found.external:
            _set_base_folder(model, folder)
            check_weights(model, model_file=path)
    keep_original(model, proto)
    return model


def _convert(proto: onnx.ModelProto) -> ir.Model:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown keys of external data, which are kept
            model = ir.from_proto(proto)
    except Exception as error:  # of any type: the cause is this file
        raise InvalidModelError(f"onnx-ir {ir.__version__} cannot represent this model: {root_cause(error)}") from error
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if "ai.onnx" in imports:  # onnx-ir writes that domain of nodes as ""
            imports.setdefault("", imports["ai.onnx"])
            del imports["ai.onnx"]
    return model


def _on_one_line(text: str) -> str:
    """Return a text with line ends and control characters, which names in a file can have, escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _set_base_folder(model: ir.Model, folder: Path) -> None:
    """Set the folder that the locations of external tensors are relative to."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ContainedTensor(
                    tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
                    doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props) or None, base_dir=folder,
                )  # fmt: skip
    for tensor in external_tensors(model):
        tensor.base_dir = folder
