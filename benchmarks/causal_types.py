"""Export every causal model type of transformers and inject the exports: built, exported, right, refused why?

    python benchmarks/causal_types.py MODELS [--only TYPE] [--exporter E] [--python PYTHON] [--seconds N]
                                      [--json OUT] [--markdown OUT]

`examples/causal_types.py` exports each type by both exporters, in a process of its own with a time limit; `--python`
names an interpreter that has torch and transformers. What MODELS already holds is not exported again. The exports are
injected and compared with the logits of torch as by `coverage.py`. Ends with 1 if a result is wrong.
"""

from __future__ import annotations

import subprocess
import sys

from campaigns.exports import run
from campaigns.exports_page import Page

PAGE = Page(
    title="Causal model types of transformers",
    text="`benchmarks/causal_types.py` exports a small model of each type of `AutoModelForCausalLM` of transformers "
    "5.24, with torch 2.13, without a cache, injects the export and compares it with the logits of torch: as a whole, "
    "token by token, in ragged chunks, and with left padding.",
    command="python benchmarks/causal_types.py MODELS --markdown docs/causal-types.md",
    causes={
        "bailing_hybrid": "pads texts to whole chunks, over which it loops in Python: recognized at a fixed length",
        "dbrx": "loops over the experts that are found by a sum over all tokens",
        "deepseek_v4": "makes one key of each whole group of 4 tokens, and none of those that are left",
        "jetmoe": "sorts all tokens of a call by their experts, and counts them",
        "kimi_linear": "pads texts to whole chunks, over which it loops in Python: recognized at a fixed length",
        "prophetnet": "joins the text with a second one for predictions of later tokens",
        "xmod": "selects the sequences of a batch by the language of each",
    },
)
LIST_TYPES = (
    "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as types; print(*types)"
)


def list_types(python: str) -> list[str]:
    """Return the causal model types of the installed transformers."""
    done = subprocess.run([python, "-c", LIST_TYPES], capture_output=True, text=True, check=True)
    return sorted(done.stdout.split())


if __name__ == "__main__":
    sys.exit(run(__doc__, "causal_types.py", list_types, PAGE))
