"""Export decoders of packages that are not transformers and inject the exports: exported, right, refused why?

    python benchmarks/other_packages.py MODELS [--only NAME] [--exporter E] [--python PYTHON] [--seconds N]
                                        [--json OUT] [--markdown OUT]

`examples/other_packages.py` lists the packages and exports a decoder of each by both exporters; `--python` names an
interpreter that has torch and the packages. Otherwise as `causal_types.py`. Ends with 1 if a result is wrong.
"""

from __future__ import annotations

import subprocess
import sys

from campaigns.exports import EXAMPLES, run
from campaigns.exports_page import Page

PAGE = Page(
    title="Decoders of packages other than transformers",
    text="`benchmarks/other_packages.py` exports small decoders of packages that are not transformers, with torch "
    "2.13, random weights and without a cache, injects the exports and compares them with the logits of torch: as a "
    "whole, token by token, and in ragged chunks. `examples/other_packages.py` lists the packages and how each decoder "
    "is built.",
    command="python benchmarks/other_packages.py MODELS --markdown docs/other-packages.md",
    causes={
        "block-recurrent": "a Python loop over blocks of 16 tokens, each of which reads the state after the one before",
        "complex": "numbers are complex, for which neither exporter has operators",
        "feedback": "a Python loop over parts of 2 tokens, each of which reads the outputs of the last layer before it",
        "flash": "fills texts up to groups of 8 tokens; earlier groups are a sum of products of keys and values",
        "gmlp": "mixes tokens by a learned matrix [sequence, sequence], without attention",
        "h-transformer": "fills texts up to a power of two, whose logarithm is the number of levels of a Python loop",
        "linear-attention": "sums products of keys and values over earlier tokens, without a softmax over them",
        "local-attention": "fills texts up to windows of 8 tokens and attends to this window and the one before",
        "mega": "convolves the text by a Fourier transform, whose size is a Python number of its length",
        "megabyte": "fills texts up to patches of 4 bytes, each of which is one token of the global decoder",
        "memory-efficient": "reads keys in parts of 512; what the exporter keeps is the first part alone",
        "memory-xl": "fills scores for distances up to a multiple of another length, a remainder, and shifts them",
        "performer": "a Python loop over chunks of tokens, each of which adds to sums over those before",
        "recurrent-memory": "memory tokens before and behind the text are queries that attend to all tokens",
        "reformer": "sorts tokens into buckets by random hashes: outputs differ from call to call",
        "routing": "gives each cluster the tokens of the whole text that are nearest to it: later ones change earlier",
        "sinkhorn": "fills texts up to buckets of 8 tokens by a method of Python numbers, `is_integer`",
        "x-transformers-t5": "the library that subtracts positions, einx, reads their number as a Python number",
    },
)


def list_decoders(python: str) -> list[str]:
    """Return the decoders of the example."""
    command = [python, str(EXAMPLES / "other_packages.py"), "--list"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(run(__doc__, "other_packages.py", list_decoders, PAGE))
