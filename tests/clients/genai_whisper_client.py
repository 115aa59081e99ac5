"""Generate with onnxruntime-genai from audio features: python genai_whisper_client.py FOLDER."""

import json
import sys
from importlib.metadata import version

import numpy as np
import onnxruntime_genai as og


def answers(folder, cases, unused):
    """Yield the generated tokens of each case, to the full length: the end token is one that is not expected."""
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"eos_token_id": unused}}))
    model = og.Model(config)
    for case in cases:
        ids = np.array(case["ids"], np.int32)
        params = og.GeneratorParams(model)
        length = ids.shape[1] + case["new"]
        params.set_search_options(batch_size=len(ids), max_length=length, do_sample=False)
        generator = og.Generator(model, params)
        tensors = og.NamedTensors()
        tensors["input_features"] = og.Tensor(np.array(case["encoder"]["input_features"], np.float32))
        generator.set_inputs(tensors)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        yield [generator.get_sequence(row)[ids.shape[1] :].tolist() for row in range(len(ids))]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"], request["unused"]))
    print(json.dumps({"versions": {"onnxruntime-genai": version("onnxruntime-genai")}, "answers": found}))
