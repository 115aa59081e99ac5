"""Answer cases with DeepSparse's TextGeneration pipeline: python deepsparse_client.py FOLDER [deepsparse|onnxruntime].

Prompts are told as text, as its users tell them; a folder without a tokenizer is given one whose words are numbers. One
text at a time, with its own engine or with onnxruntime.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import onnx
from deepsparse import TextGeneration
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PROMPT = 4  # tokens of a prompt that are given at once, where the model can take several
END = "<end>"
ROOM = 8  # tokens of context beyond those that are asked for, at least


def answers(folder, cases, engine_type):
    """Yield the new tokens of each case, greedy; one text at a time."""
    tokenizer = tokenizer_of(folder)
    longest = max(len(case["ids"][0]) + case["new"] for case in cases) + ROOM
    # Its own engine crashes on small models with more than one core, and on these and others with the cache inside.
    pipeline = TextGeneration(
        model_path=str(folder), engine_type=engine_type, num_cores=1, internal_kv_cache=False, force_max_tokens=True,
        sequence_length=longest + -longest % PROMPT, prompt_sequence_length=PROMPT,
    )  # fmt: skip
    for case in cases:
        yield [tokens(pipeline, tokenizer, row, case["new"]) for row in case["ids"]]


def tokens(pipeline, tokenizer, ids, new):
    """Return the tokens that follow a text."""
    said = tokenizer.decode(ids)
    assert tokenizer(said)["input_ids"] == ids, f"the tokenizer does not give {ids} back"
    found = []
    pipeline(sequences=said, max_new_tokens=new, do_sample=False, callback=found.append)
    return [int(token) for token in found[:new]]  # it gives one more


def tokenizer_of(folder):
    """Return the folder's tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        width = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
        words = {END: 0, **{str(token): token for token in range(1, width)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(Path(sys.argv[1]), request["cases"], (sys.argv[2:] or ["deepsparse"])[0]))
    print()
    print(json.dumps({"versions": {"deepsparse": version("deepsparse")}, "answers": found}))
