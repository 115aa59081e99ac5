"""Generate with optimum's `ORTModelForSeq2SeqLM` or `ORTModelForSpeechSeq2Seq`: python ... FOLDER."""

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTModelForSpeechSeq2Seq
from transformers import GenerationMixin

SUPPRESSED = ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")  # which the reference ignores


def answers(folder, cases):
    """Yield the generated tokens of each case."""
    audio = "input_features" in cases[0]["encoder"]
    model = (ORTModelForSpeechSeq2Seq if audio else ORTModelForSeq2SeqLM).from_pretrained(folder)
    assert model.decoder.is_merged
    for name in SUPPRESSED:
        setattr(model.generation_config, name, None)
    for case in cases:
        given = {name: torch.tensor(rows) for name, rows in case["encoder"].items()}
        made = GenerationMixin.generate(  # Whisper's own `generate` cuts audio into segments before it calls this one
            model, **given, decoder_input_ids=torch.tensor(case["ids"]), max_new_tokens=case["new"], do_sample=False,
            num_beams=1, eos_token_id=None, pad_token_id=0, repetition_penalty=1.0,
        )  # fmt: skip
        yield made[:, len(case["ids"][0]) :].tolist()


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"]))
    versions = {name: version(name) for name in ("optimum-onnx", "transformers", "onnxruntime")}
    print(json.dumps({"versions": versions, "answers": found}))
