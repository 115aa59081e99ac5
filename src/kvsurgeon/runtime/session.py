"""Sessions of onnxruntime, opened by path or from memory, with one-line error messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime as ort

from kvsurgeon.errors import InvalidModelError, KvsurgeonError, MissingKernelError, RunError, UsageError, WeightsError
from kvsurgeon.io.locate import find_model
from kvsurgeon.runtime.providers import CPU, find_provider
from kvsurgeon.runtime.shared_weights import share_weights
from kvsurgeon.runtime.tensors import from_session

Optimization = Literal["off", "basic", "all"]
Source = str | Path | onnx.ModelProto

_LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FATAL_ONLY = 4
_LARGEST_MESSAGE = 2**31 - 1  # bytes of a protobuf message


class Session:
    """A model opened in onnxruntime.

    Attributes:
        name: Name of the model in messages.
        inputs: Its inputs.
        outputs: Its outputs.
        metadata: Metadata of the file.
    """

    def __init__(self, session: ort.InferenceSession, name: str, weights: Sequence[Any] = ()) -> None:
        """Wrap a session, and keep alive the weights that it reads in place."""
        self._session = session
        self._weights = weights
        self.name = name
        self.inputs = tuple(from_session(info) for info in session.get_inputs())
        self.outputs = tuple(from_session(info) for info in session.get_outputs())
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Mapping[str, Any], bound: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run the model, and return all outputs as values of onnxruntime.

        Args:
            feeds: A value of onnxruntime for each input; see `to_runtime`.
            bound: Values that outputs are written to, which may be values of inputs.

        Raises:
            RunError: An operator fails, or a value does not fit its input.
        """
        names = [output.name for output in self.outputs]
        try:
            if bound:
                values = self._run_bound(names, feeds, bound)
            else:
                values = self._session.run_with_ort_values(names, dict(feeds))
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise RunError(f"{self.name} cannot be run: {short_message(error)}") from error
        return dict(zip(names, values, strict=True))

    def _run_bound(self, names: Sequence[str], feeds: Mapping[str, Any], bound: Mapping[str, Any]) -> list[Any]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            if name in bound:
                binding.bind_ortvalue_output(name, bound[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return list(binding.get_outputs())


def open_session(
    source: Source,
    *,
    folder: str | Path | None = None,
    threads: int | None = None,
    optimization: Optimization = "all",
    arena: bool = True,
    provider: str = CPU,
    name: str | None = None,
) -> Session:
    """Open a model in onnxruntime.

    Args:
        source: A file, a folder with `model.onnx`, or a model in memory.
        folder: Folder of the external data of a model in memory.
        threads: Number of threads per operator; None for onnxruntime's default.
        optimization: Level of onnxruntime's graph optimization.
        arena: Whether memory is kept between calls, as much as the largest call needs.
        provider: Execution provider, as `cuda` or `cuda{device_id=1}`; the CPU runs what it does not.
        name: Name of the model in messages.

    Raises:
        UsageError: The installed onnxruntime has no such provider, or its device is missing.
        InputError: The file does not exist.
        InvalidModelError: The file is not ONNX, or the graph is invalid.
        WeightsError: The external data cannot be read.
        MissingKernelError: onnxruntime lacks a kernel for one of the operators.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = _LEVELS[optimization]
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = False  # one is kept for each new length: 12 KB per token for a small hybrid
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    name = name or (f"`{source}`" if isinstance(source, str | Path) else "the model")
    readable = _readable(source, folder, options)
    here = None if folder is None else Path(folder)
    weights = share_weights(source, here, options) if isinstance(source, onnx.ModelProto) else ()
    chosen = find_provider(provider)
    try:
        session = ort.InferenceSession(readable, options, providers=[chosen])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _load_error(error, name) from error
    session.disable_fallback()
    if chosen[0] not in session.get_providers():  # onnxruntime opened the model on the CPU, after a warning
        raise UsageError(f"the provider {provider} cannot be used: its libraries or its device are missing")
    return Session(session, name, weights)


def folder_of(source: Source, folder: str | Path | None = None) -> Path | None:
    """Return the folder of a model's weights: that of its file, or the one given for a model in memory.

    Raises:
        InputError: The file does not exist.
    """
    if isinstance(source, str | Path):
        return find_model(source).parent
    return None if folder is None else Path(folder)


def short_message(error: Exception) -> str:
    """Return a message of onnxruntime without its codes and source lines."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed: ?", "", text)
    text = re.sub(r"/\S+\.(?:cc|h):\d+ (?:[\w:<>&*,\s]+\([^()]*\)(?: const)? )?", "", text)
    text = re.sub(r"^Non-zero status code returned while running (\w+) node\. Name:'([^']*)' ", r"\1 `\2`: ", text)
    return text.replace("Status Message: ", "")


def _readable(source: Source, folder: str | Path | None, options: ort.SessionOptions) -> str | bytes:
    if not isinstance(source, onnx.ModelProto):
        return str(find_model(source))
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if source.ByteSize() > _LARGEST_MESSAGE:
        raise UsageError("expected a model below 2 GB in memory, found a larger one (save it and give its path)")
    return bytes(source.SerializeToString())


def _load_error(error: Exception, name: str) -> KvsurgeonError:
    line = short_message(error)
    if "NOT_IMPLEMENTED" in str(error) or "is not a registered function/op" in line:
        return MissingKernelError(f"onnxruntime cannot run {name}: {line}")
    if "xternal data" in line or "external_data" in line:
        return WeightsError(f"the weights of {name} cannot be read: {line}")
    return InvalidModelError(f"onnxruntime does not accept {name}: {line}")
