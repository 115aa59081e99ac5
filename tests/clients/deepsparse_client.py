"""Generate with DeepSparse's TextGeneration pipeline: python deepsparse_client.py FOLDER [deepsparse|onnxruntime].

Prompts are texts; a folder without a tokenizer gets one whose words are numbers. One text at a time, with its engine or
with onnxruntime. With a third argument, `uncached`, its engine runs a model without a cache on the whole text for each
token.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from deepsparse import Engine, TextGeneration
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "<end>"
MARGIN = 8  # minimum number of unused tokens of the context


def answers(folder, cases, engine_type):
    """Yield the generated tokens of each case, with prefill token by token or in chunks."""
    tokenizer = tokenizer_of(folder)
    length = context_length(cases)
    pipelines = {}
    for case in cases:
        chunk = case["chunk"] or 1
        if chunk not in pipelines:  # with an internal cache, the default, the engine crashes on these models
            pipelines[chunk] = TextGeneration(
                model_path=str(folder), engine_type=engine_type, num_cores=1, internal_kv_cache=False,
                force_max_tokens=True, sequence_length=length, prompt_sequence_length=chunk,
            )  # fmt: skip
        yield [tokens(pipelines[chunk], tokenizer, row, case["new"]) for row in case["ids"]]


def uncached_answers(folder, cases):
    """Yield the generated tokens of a model without a cache; texts have right padding, which causality masks."""
    length = context_length(cases)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    types = {value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
             for value in graph.input if value.name not in stored}  # fmt: skip
    model = str(folder / "model.onnx")
    engine = Engine(model, batch_size=1, num_cores=1, input_shapes=[[1, length]] * len(types))
    for case in cases:
        yield [uncached_tokens(engine, types, row, case["new"], length) for row in case["ids"]]


def uncached_tokens(engine, types, ids, new, length):
    """Return the tokens that follow a text, with a run of the whole text for each."""
    text = list(ids)
    for _ in range(new):
        padding = [0] * (length - len(text))
        given = {name: text + padding for name in types}
        given |= {name: [1] * len(text) + padding for name in types if "mask" in name}
        given |= {name: range(length) for name in types if "pos" in name}
        logits = engine.run([np.array([given[name]], types[name]) for name in engine.input_names])[0]
        text.append(int(logits[0, len(text) - 1].argmax()))
    return text[len(ids) :]


def context_length(cases):
    """Return a length for all texts, which is a multiple of every chunk."""
    longest = max(len(case["ids"][0]) + case["new"] for case in cases) + MARGIN
    return longest + -longest % 4


def tokens(pipeline, tokenizer, ids, new):
    """Return the tokens that follow a text."""
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids, f"the tokenizer does not return {ids}"
    found = []
    pipeline(sequences=text, max_new_tokens=new, do_sample=False, callback=found.append)
    return [int(token) for token in found[:new]]  # it generates one more


def tokenizer_of(folder):
    """Return the folder's tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        vocab_size = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
        words = {END: 0, **{str(token): token for token in range(1, vocab_size)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    request = json.load(sys.stdin)
    folder, engine_type, *uncached = [Path(sys.argv[1]), *(sys.argv[2:] or ["deepsparse"])]
    cases = request["cases"]
    found = list(uncached_answers(folder, cases) if uncached else answers(folder, cases, engine_type))
    print()
    print(json.dumps({"versions": {"deepsparse": version("deepsparse")}, "answers": found}))
