"""Generate as an application for Qualcomm Cloud AI 100 does, in onnxruntime: python qaic_client.py FOLDER.

The device is compiled for the sizes in specializations.json and keeps every `..._RetainedState` as the input of that
name in the next call. Chunks have right padding with position -1, and the output is one row of logits.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime

RETAINED = "_RetainedState"
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Device:
    """A program compiled for a few sizes, and its retained state."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        sizes = json.loads((folder / "specializations.json").read_text("utf-8"))["specializations"]
        self.lengths = sorted(int(size["seq_len"]) for size in sizes)
        self.context = int(sizes[0]["ctx_len"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def start(self):
        """Reset the retained state to arbitrary values."""
        dims = {"ctx_len": self.context}
        self.retained = {
            given.name: np.full([dims.get(dim, dim) for dim in given.shape], 7, TYPES[given.type])
            for given in self.session.get_inputs()
            if given.name.startswith("past_")
        }

    def call(self, ids, positions, length):
        """Return the logits of the last token of a chunk, which is padded to one of the sizes."""
        assert length in self.lengths
        assert positions[-1] < self.context
        pads = length - len(ids)
        feeds = {"input_ids": [[*ids, *[0] * pads]], "position_ids": [[*positions, *[-1] * pads]]}
        given = {name: np.array(values, np.int64) for name, values in feeds.items()}
        results = dict(zip(self.outputs, self.session.run(None, {**given, **self.retained}), strict=True))
        self.retained = {name: results[name + RETAINED] for name in self.retained}
        assert results["logits"].shape[:2] == (1, 1)
        return results["logits"][0, 0]


def answers(folder, cases):
    """Yield the generated tokens of each case, with prefill in chunks."""
    device = Device(Path(folder))
    for case in cases:
        (ids,) = case["ids"]
        if case["chunk"]:
            device.lengths = [1, case["chunk"]]
        device.start()
        prefill = device.lengths[-1]
        for start in range(0, len(ids), prefill):
            chunk = ids[start : start + prefill]
            logits = device.call(chunk, range(start, start + len(chunk)), prefill)
        new = [int(logits.argmax())]
        while len(new) < case["new"]:
            new.append(int(device.call(new[-1:], [len(ids) + len(new) - 1], 1).argmax()))
        yield [new]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"]))
    print(json.dumps({"versions": {"onnxruntime": version("onnxruntime")}, "answers": found}))
