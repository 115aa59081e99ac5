"""Answer cases with DeepSparse's decoder engine and cache: python deepsparse_client.py FOLDER [deepsparse|onnxruntime].

What its `TextGeneration` pipeline does for a prompt, without the tokenizer: `NLDecoderEngine` fixes the graph to one
context length, `compute_engine_inputs` makes the inputs of each step, `DecoderKVCache` shifts the caches, and one of
two engines runs the graph.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from deepsparse.transformers.engines import NLDecoderEngine
from deepsparse.transformers.utils.decoder_kv_cache import DecoderKVCache
from deepsparse.transformers.utils.helpers import compute_engine_inputs

ROOM = 8  # tokens of context beyond those that are asked for


def answers(folder, cases, engine_type):
    """Yield the new tokens of each case, greedy; one text at a time, token by token."""
    length = max(len(case["ids"][0]) + case["new"] for case in cases) + ROOM
    model = str(Path(folder) / "model.onnx")
    engine = NLDecoderEngine(model, engine_type, {"batch_size": 1}, length, 1, internal_kv_cache=False)
    for case in cases:
        yield [list(tokens(engine, row, case["new"], length)) for row in case["ids"]]


def tokens(engine, text, new, length):
    """Yield the tokens that follow a text."""
    cache = DecoderKVCache(False)
    cache.setup({name: np.zeros(engine.cache_shape, np.float32) for name in engine.onnx_input_names_cached})
    text = list(text)
    wanted = len(text) + new
    for done in range(wanted - 1):
        given = compute_engine_inputs(
            engine.onnx_input_names_no_cache,
            token_batch=[text[done]],
            prompt_sequence_length=1,
            sequence_length=length,
            num_total_processed_tokens=done,
        )
        logits = engine(given, cache)
        if done == len(text) - 1:
            text.append(int(logits[0, -1].argmax()))
            yield text[-1]


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"], (sys.argv[2:] or ["deepsparse"])[0]))
    print()
    print(json.dumps({"versions": {"deepsparse": version("deepsparse")}, "answers": found}))
