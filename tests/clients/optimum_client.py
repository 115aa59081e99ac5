"""Generate with optimum's `ORTModelForCausalLM`: python optimum_client.py FOLDER."""

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def answers(folder, cases):
    """Yield the generated tokens of each case; batches have left padding."""
    model = ORTModelForCausalLM.from_pretrained(folder)
    model.generation_config.forced_eos_token_id = None  # which the reference ignores
    for case in cases:
        given = {"input_ids": torch.tensor(case["ids"]), "attention_mask": torch.tensor(case["mask"])}
        made = model.generate(
            **given, max_new_tokens=case["new"], do_sample=False, num_beams=1,
            eos_token_id=None, pad_token_id=0, repetition_penalty=1.0,
        )  # fmt: skip
        yield made[:, given["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    request = json.load(sys.stdin)
    found = list(answers(sys.argv[1], request["cases"]))
    versions = {name: version(name) for name in ("optimum-onnx", "transformers", "onnxruntime")}
    print(json.dumps({"versions": versions, "answers": found}))
