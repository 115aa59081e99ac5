"""A model opened in onnxruntime: quiet, with errors of one line, by path or from memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort

from kvsurgeon.errors import (
    InputError,
    InvalidModelError,
    KvsurgeonError,
    MissingKernelError,
    RunError,
    UsageError,
    WeightsError,
)
from kvsurgeon.runtime.tensors import declared, to_runtime

Optimisation = Literal["off", "basic", "all"]
Source = str | Path | onnx.ModelProto

_LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FATAL_ONLY = 4
_OPEN_FILES = "/proc/self/fd"  # where Linux shows a process its open files
_LARGEST_MESSAGE = 2**31 - 1  # bytes that protobuf can hold in one message


class Session:
    """A model that can be run.

    Attributes:
        name: What to call the model in a message.
        inputs: What it must be given.
        outputs: What it returns.
        metadata: What is noted in the file beside the graph.
    """

    def __init__(self, session: ort.InferenceSession, name: str, held: Sequence[Any] = ()) -> None:
        """Take a session, and what it reads from where it lies."""
        self._session = session
        self._held = held
        self.name = name
        self.inputs = tuple(declared(info) for info in session.get_inputs())
        self.outputs = tuple(declared(info) for info in session.get_outputs())
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Mapping[str, Any], into: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run once on values of onnxruntime (see `tensor.to_runtime`), and return all outputs as such.

        Args:
            feeds: What each input is given.
            into: Values that outputs are written to, which may be those that inputs are given.

        Raises:
            RunError: An operator fails, or a value does not fit its input.
        """
        names = [output.name for output in self.outputs]
        try:
            if into:
                values = self._run_into(names, feeds, into)
            else:
                values = self._session.run_with_ort_values(names, dict(feeds))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise RunError(f"{self.name} cannot be run: {useful_line(error)}") from error
        return dict(zip(names, values, strict=True))

    def _run_into(self, names: Sequence[str], feeds: Mapping[str, Any], into: Mapping[str, Any]) -> list[Any]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            if name in into:
                binding.bind_ortvalue_output(name, into[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return list(binding.get_outputs())


def open_session(
    source: Source,
    *,
    folder: str | Path | None = None,
    threads: int | None = None,
    optimisation: Optimisation = "all",
    name: str | None = None,
) -> Session:
    """Open a model in onnxruntime.

    Args:
        source: A file, a folder that holds `model.onnx`, or a model in memory.
        folder: Where the external data of a model in memory lies.
        threads: Threads that one operator may use; None leaves it to onnxruntime.
        optimisation: How far onnxruntime may rewrite the graph before it runs it.
        name: What to call the model in a message.

    Raises:
        InputError: There is no such file.
        InvalidModelError: It is not ONNX, or its graph is not valid.
        WeightsError: Its external data cannot be read.
        MissingKernelError: It is valid, and onnxruntime cannot run it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = _LEVELS[optimisation]
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    name = name or (f"`{source}`" if isinstance(source, str | Path) else "the model")
    readable = _readable(source, folder, options)
    held = {} if isinstance(source, str | Path) else _held(source)
    options.add_external_initializers(list(held), list(held.values()))
    try:
        session = ort.InferenceSession(readable, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _explained(error, name) from error
    return Session(session, name, tuple(held.values()))


def model_file(path: str | Path) -> Path:
    """Return the file meant by a path: itself, or the `.onnx` file of a folder.

    Raises:
        InputError: There is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"expected an .onnx file or a folder that holds one, found nothing at `{path}`")
    found = [path / "model.onnx"] if (path / "model.onnx").is_file() else sorted(path.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise InputError(f"expected model.onnx or one .onnx file, found {names} - in `{path}` (name the file)")
    return found[0]


def folder_of(source: Source, folder: str | Path | None = None) -> Path | None:
    """Return where the weights of a model lie: beside its file, or in the folder that is given with one in memory.

    Raises:
        InputError: There is no such file.
    """
    if isinstance(source, str | Path):
        return model_file(source).parent
    return None if folder is None else Path(folder)


def useful_line(error: Exception) -> str:
    """Return the part of onnxruntime's message that says what is wrong, without its codes and source lines."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    text = re.sub(r"/\S+\.(?:cc|h):\d+ (?:[\w:<>&*,\s]+\([^()]*\)(?: const)? )?", "", text)
    text = re.sub(r"^Non-zero status code returned while running (\w+) node\. Name:'([^']*)' ", r"\1 `\2`: ", text)
    return text.replace("Status Message: ", "")


def _readable(source: Source, folder: str | Path | None, options: ort.SessionOptions) -> str | bytes:
    if not isinstance(source, onnx.ModelProto):
        return str(model_file(source))
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if source.ByteSize() > _LARGEST_MESSAGE:
        raise UsageError("expected a model below 2 GB in memory, found a larger one (save it, and give its path)")
    return bytes(source.SerializeToString())


def _held(model: onnx.ModelProto) -> dict[str, Any]:
    """Weights in files that this process holds open, mapped; onnxruntime takes no other files than the model's."""
    found: dict[str, Any] = {}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location", "").startswith(f"{_OPEN_FILES}/"):
            dtype, offset = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), int(where.get("offset", 0))
            array = np.memmap(where["location"], dtype=dtype, mode="r", offset=offset, shape=tuple(tensor.dims))
            found[tensor.name] = to_runtime(array)
    return found


def _explained(error: Exception, name: str) -> KvsurgeonError:
    line = useful_line(error)
    if "NOT_IMPLEMENTED" in str(error) or "is not a registered function/op" in line:
        return MissingKernelError(f"onnxruntime cannot run {name}: {line}")
    if "xternal data" in line or "external_data" in line:
        return WeightsError(f"the weights of {name} cannot be read: {line}")
    return InvalidModelError(f"onnxruntime does not accept {name}: {line}")
