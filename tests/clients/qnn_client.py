"""Generate as Genie does on a phone, in onnxruntime: python qnn_client.py FOLDER.

The model has two files, for a prefill of AR tokens per call and for a decode step, with the same context length. The
application keeps the rows of the cache, the latest last, computes masks and rotary tables from context.json, adds right
padding to chunks, and appends the new rows of real tokens to the cache.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
SEQUENCE = {"key": 3, "value": 2}  # axis of [kv_heads, 1, head_dim, rows] and [kv_heads, 1, rows, head_dim]


class Variant:
    """One file of the model, with fixed sizes."""

    def __init__(self, file):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        self.inputs = {given.name: given for given in self.session.get_inputs()}
        self.outputs = [output.name for output in self.session.get_outputs()]
        every = [*self.session.get_inputs(), *self.session.get_outputs()]
        assert all(isinstance(size, int) for one in every for size in one.shape)
        self.length = self.inputs["input_ids"].shape[1]

    def run(self, feeds):
        """Return the outputs by name."""
        typed = {name: array.astype(TYPES[self.inputs[name].type]) for name, array in feeds.items()}
        return dict(zip(self.outputs, self.session.run(None, typed), strict=True))


class Phone:
    """The application, with the rows of the cache."""

    def __init__(self, folder):
        self.prefill, self.decode = Variant(folder / "prefill.onnx"), Variant(folder / "decode.onnx")
        assert self.decode.length == 1
        self.context = json.loads((folder / "context.json").read_text("utf-8"))["inputs"]
        names = [name for name in self.decode.inputs if name.startswith("past_")]
        self.caches = {name: "key" if "_key_" in name else "value" for name in names}

    def start(self):
        """Clear the cache."""
        self.past = 0
        self.rows = {}
        for name, kind in self.caches.items():
            given = self.decode.inputs[name]
            shape = list(given.shape)
            shape[SEQUENCE[kind]] = 0
            self.rows[name] = np.zeros(shape, TYPES[given.type])

    def call(self, variant, ids):
        """Return the logits of the last token of a chunk."""
        length = variant.length
        name, kind = next(iter(self.caches.items()))
        capacity = variant.inputs[name].shape[SEQUENCE[kind]]
        filled = np.zeros((1, length), np.int32)
        filled[0, : len(ids)] = ids
        feeds = {"input_ids": filled, **self.pasts(capacity)}
        feeds |= {name: self.computed(how, length, capacity) for name, how in self.context.items()}
        results = variant.run(feeds)
        for name, kind in self.caches.items():
            new = results[name.removesuffix("_in") + "_out"]
            assert new.shape[SEQUENCE[kind]] == length
            rows = np.take(new, range(len(ids)), axis=SEQUENCE[kind])
            self.rows[name] = np.concatenate([self.rows[name], rows], axis=SEQUENCE[kind])
        self.past += len(ids)
        return results["logits"][0, len(ids) - 1]

    def pasts(self, capacity):
        """Return each cache with its rows at the end, after arbitrary values."""
        assert self.past <= capacity, "the context is full"
        pasts = {}
        for name, kind in self.caches.items():
            missing = list(self.rows[name].shape)
            missing[SEQUENCE[kind]] = capacity - self.past
            pasts[name] = np.concatenate([np.full(missing, 7.0), self.rows[name]], axis=SEQUENCE[kind])
        return pasts

    def computed(self, how, length, capacity):
        """Return one computed input, [1, heads, length or 1, positions or features]."""
        queries = self.past + np.arange(length)
        keys = self.past + np.arange(-capacity, length)
        table = np.array(how.get("table", how.get("seen")), dtype=np.float64)
        if how["kind"] == "rows":
            rows = table[np.minimum(queries, len(table) - 1)]
            return rows.reshape(1, 1, length, -1)
        if how["kind"] == "columns":
            return np.atleast_2d(table)[None, :, None, np.clip(keys, 0, table.shape[-1] - 1)]
        distance = queries[:, None] - keys[None, :]
        numbers = table.reshape(-1, table.shape[-1] if table.ndim else 1)
        visible = numbers[:, np.clip(distance, 0, numbers.shape[1] - 1)]
        return np.where((distance >= 0) & (keys >= 0), visible, how["hidden"])[None]


def answers(folder, cases):
    """Yield the generated tokens of each case, with prefill in chunks."""
    phone = Phone(Path(folder))
    for case in cases:
        (ids,) = case["ids"]
        size = min(case["chunk"] or len(ids), phone.prefill.length)
        phone.start()
        for start in range(0, len(ids), size):
            logits = phone.call(phone.prefill, ids[start : start + size])
        new = [int(logits.argmax())]
        while len(new) < case["new"]:
            new.append(int(phone.call(phone.decode, new[-1:]).argmax()))
        yield [new]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"]))
    print(json.dumps({"versions": {"onnxruntime": version("onnxruntime")}, "answers": found}))
