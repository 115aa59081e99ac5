"""Compile files with OpenVINO and run each once: python openvino_fixed.py FOLDER.

The inputs of `NAME.onnx` are read from `NAME.npz`, and its outputs are written to `NAME.out.npz`.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino as ov

CONFIG = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}


def run(file):
    """Compile one file for the CPU, run it, and write its outputs."""
    core = ov.Core()
    model = core.compile_model(core.read_model(file), "CPU", CONFIG)
    assert all(port.partial_shape.is_static for port in (*model.inputs, *model.outputs))
    with np.load(file.with_suffix(".npz")) as feeds:
        results = model.create_infer_request().infer({name: feeds[name] for name in feeds.files})
    found = {name: value for port, value in results.items() for name in port.names}
    np.savez(file.with_suffix(".out.npz"), **found)


if __name__ == "__main__":
    for each in sorted(Path(sys.argv[1]).glob("*.onnx")):
        run(each)
    print(version("openvino"))
