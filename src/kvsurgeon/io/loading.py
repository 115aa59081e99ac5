"""Load the graph of a model, and nothing of its weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InputError, InvalidModelError
from kvsurgeon.io.external_data import ContainedTensor, check_weights, external_tensors
from kvsurgeon.io.gc_pause import collector_resting
from kvsurgeon.io.locate import find_model, read_proto
from kvsurgeon.io.roundtrip import remember
from kvsurgeon.io.validate import check_model

_PATH = "kvsurgeon.path"


def load(source: str | Path | onnx.ModelProto, *, folder: str | Path | None = None) -> ir.Model:
    """Return the model with its nodes in an order of execution and its weights where they are.

    Args:
        source: An .onnx file, a folder holding one, or a proto, which is not changed.
        folder: Where the external data of a proto lies. Without it such data is neither looked for nor checked.

    Raises:
        InputError: There is no model at that path.
        InvalidModelError: It is not ONNX, not whole, or its graph is not valid.
        WeightsError: External data is missing, too short or outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)  # onnx-ir writes the new name of a renamed initializer into the proto that it came from
        return _build(proto, None if folder is None else Path(folder), None)
    path = find_model(source).absolute()
    proto = read_proto(path)
    try:
        model = _build(proto, path.parent, path)
    except InputError as error:
        raise type(error)(_on_one_line(f"`{path}`: {error}")) from error
    model.meta[_PATH] = path
    return model


def loaded_from(model: ir.Model) -> Path | None:
    """Return the file that the model was loaded from, if it was one."""
    path = model.meta.get(_PATH)
    return path if isinstance(path, Path) else None


def _build(proto: onnx.ModelProto, folder: Path | None, path: Path | None) -> ir.Model:
    with collector_resting():
        found = check_model(proto)
        model = _convert(proto)
        if not found.ordered:
            _sort(model)
        if folder is not None and found.external:
            _settle_weights(model, folder)
            check_weights(model, model_file=path)
    remember(model, proto)
    return model


def _convert(proto: onnx.ModelProto) -> ir.Model:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keys of external data that ONNX does not know: they are kept
            model = ir.from_proto(proto)
    except Exception as error:  # whatever onnx-ir stumbles over, it is this file that it stumbles over
        raise InvalidModelError(f"onnx-ir {ir.__version__} cannot represent this model: {_innermost(error)}") from error
    for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if "ai.onnx" in imports:  # nodes of that domain have "" in the IR, so its version must be found there
            imports.setdefault("", imports["ai.onnx"])
            del imports["ai.onnx"]
    return model


def _on_one_line(text: str) -> str:
    """Return the text with what a file may have put into a name, line ends and control codes, dim_names out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sort(model: ir.Model) -> None:
    model.graph.sort()
    for function in model.functions.values():
        function.sort()


def _settle_weights(model: ir.Model, folder: Path) -> None:
    """Tell each external tensor the folder that its location is relative to."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = _settled(tensor, folder)
    for tensor in external_tensors(model):
        tensor.base_dir = folder


def _settled(tensor: ir.ExternalTensor, folder: Path) -> ContainedTensor:
    return ContainedTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
        base_dir=folder,
    )
