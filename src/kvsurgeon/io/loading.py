"""Load the graph of a model without reading its weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InputError, InvalidModelError
from kvsurgeon.io.external_data import ContainedTensor, check_weights, external_tensors
from kvsurgeon.io.gc_pause import gc_paused
from kvsurgeon.io.locate import find_model, read_proto
from kvsurgeon.io.roundtrip import keep_original, root_cause
from kvsurgeon.io.stored_weights import WeightsInFile
from kvsurgeon.io.validate import check_model

_PATH = "kvsurgeon.path"


def load(source: str | Path | onnx.ModelProto, *, folder: str | Path | None = None) -> ir.Model:
    """Load a model; its nodes are sorted in execution order, and its weights stay in their files.

    Args:
        source: An .onnx file, a folder with one, or a proto, which is not changed.
        folder: The folder of the external data of a proto. Without it, external data is not checked.

    Raises:
        InputError: There is no model at that path.
        InvalidModelError: It is not ONNX, truncated, or its graph is invalid.
        WeightsError: External data is missing, too short or outside the folder of the model.
    """
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
