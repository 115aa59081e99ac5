"""Generate with OpenVINO, with the cache as inputs or as state: python openvino_client.py FOLDER [stateful]."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino as ov
from openvino._offline_transformations import apply_make_stateful_transformation

NEW, ALL = ("input_ids", "position_ids"), ("attention_mask",)


def compiled(folder, *, stateful):
    """Return the model compiled for the CPU, in float32 throughout, and its pairs of past and present."""
    core = ov.Core()
    model = core.read_model(Path(folder) / "model.onnx")
    pasts = [name for port in model.inputs for name in port.names if name.startswith("past_key_values")]
    pairs = {past: past.replace("past_key_values", "present") for past in pasts}
    if stateful:
        apply_make_stateful_transformation(model, pairs)
    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 1}
    return core.compile_model(model, "CPU", config), pairs


def answers(folder, cases, *, stateful):
    """Yield the generated tokens of each case, with prefill in chunks."""
    model, pairs = compiled(folder, stateful=stateful)
    request = model.create_infer_request()
    for case in cases:
        for state in request.query_state():
            state.reset()  # [batch, kv_heads, 0, head_dim], or a state of a fixed size
            state.state = ov.Tensor(np.zeros([len(case["ids"]), *state.state.shape[1:]], np.float32))
        yield list(zip(*tokens(request, pairs, case, stateful=stateful), strict=True))


def tokens(request, pairs, case, *, stateful):
    """Yield the next token of each row, step by step."""
    ids, mask = np.array(case["ids"]), np.array(case["mask"])
    ports = {name: port for port in request.model_inputs for name in port.names}  # removing a cast may add a name
    pasts = {} if stateful else {past: empty(ports[past], len(ids)) for past in pairs}
    done, chunk = 0, case["chunk"] or ids.shape[1]
    while True:
        end = min(done + chunk, ids.shape[1])
        whole = {
            "input_ids": ids[:, done:end],
            "attention_mask": mask[:, :end],
            "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, done:end],
        }
        given = {name: whole[name].astype(ports[name].element_type.to_dtype()) for name in whole if name in ports}
        if "beam_idx" in ports:
            given["beam_idx"] = np.arange(len(ids), dtype=np.int32)
        results = request.infer({**given, **pasts})
        found = {name: value for port, value in results.items() for name in port.names}
        pasts = {} if stateful else {past: found[present].copy() for past, present in pairs.items()}
        done = end
        if done < ids.shape[1]:
            continue
        new = found["logits"][:, -1].argmax(-1)
        yield new.tolist()
        if done == case_length(case):
            return
        ids = np.concatenate([ids, new[:, None]], axis=1)
        mask = np.concatenate([mask, np.ones_like(new)[:, None]], axis=1)


def case_length(case):
    """Return the number of input tokens when the last token is generated."""
    return len(case["ids"][0]) + case["new"] - 1


def empty(port, batch):
    """Return a past without rows."""
    dims = [dim.get_length() if dim.is_static else 0 for dim in port.partial_shape]
    return np.zeros([batch, *dims[1:]], port.element_type.to_dtype())


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"], stateful="stateful" in sys.argv[2:]))
    print(json.dumps({"versions": {"openvino": version("openvino")}, "answers": found}))
