"""Generate as an application with a TensorRT engine does, in onnxruntime: python tensorrt_client.py FOLDER.

Each cache is one buffer of fixed length, bound as past and as present: the engine updates it in place at the given
index, and the mask hides the other rows.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Engine:
    """A session whose pasts and presents are the same buffers."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        self.inputs = {given.name: given for given in self.session.get_inputs()}
        self.types = {name: TYPES[given.type] for name, given in self.inputs.items()}

    def start(self):
        """Reset the buffers to arbitrary values."""
        caches = [name for name, given in self.inputs.items() if len(given.shape) == 4]
        assert all(isinstance(size, int) for name in caches for size in self.inputs[name].shape)
        self.buffers = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full(self.inputs[name].shape, 7, self.types[name]))
            for name in caches
        }
        self.length = self.inputs[caches[0]].shape[2]

    def call(self, ids, past):
        """Return the logits of the last token of a chunk after `past` tokens."""
        binding = self.session.io_binding()
        positions = np.arange(past, past + len(ids))[None]
        mask = (np.arange(self.length) < past + len(ids))[None]
        count = np.array([past])
        feeds = {
            "input_ids": np.array([ids]), "position_ids": positions,
            "attention_mask": mask, "past_sequence_length": count,
        }  # fmt: skip
        for name, array in feeds.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, array.astype(self.types[name]))
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        logits = dict(zip((one.name for one in self.session.get_outputs()), binding.get_outputs(), strict=False))
        return next(value.numpy() for value in logits.values() if len(value.shape()) == 3)[0, -1]


def answers(folder, cases):
    """Yield the generated tokens of each case, with prefill in chunks."""
    engine = Engine(Path(folder))
    for case in cases:
        (ids,) = case["ids"]
        engine.start()
        chunk = case["chunk"] or len(ids)
        for start in range(0, len(ids), chunk):
            logits = engine.call(ids[start : start + chunk], start)
        new = [int(logits.argmax())]
        while len(new) < case["new"]:
            new.append(int(engine.call(new[-1:], len(ids) + len(new) - 1).argmax()))
        yield [new]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"]))
    print(json.dumps({"versions": {"onnxruntime": version("onnxruntime")}, "answers": found}))
