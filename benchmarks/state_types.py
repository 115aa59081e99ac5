"""Export the model types of transformers with convolutional or recurrent states, and inject the exports.

    python benchmarks/state_types.py MODELS [--only TYPE] [--exporter E] [--python PYTHON] [--seconds N]
                                     [--json OUT] [--markdown OUT]

`examples/state_types.py` makes the exports, with symbols or else at a fixed length. Otherwise as `causal_types.py`.
Ends with 1 if a result is wrong.
"""

from __future__ import annotations

import subprocess
import sys

from campaigns.exports import EXAMPLES, run
from campaigns.exports_page import Page

PAGE = Page(
    title="Model types with states",
    text="`benchmarks/state_types.py` exports a small model of each type of transformers that has states outside "
    "attention, without a cache: with a batch and a length that are symbols, or else one sequence of 16 tokens. It "
    "injects the export and compares it with the logits of torch.",
    command="python benchmarks/state_types.py MODELS --seconds 900 --markdown docs/state-types.md",
)


def list_types(python: str) -> list[str]:
    """Return the types of the example."""
    command = [python, str(EXAMPLES / "state_types.py"), "--list"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(run(__doc__, "state_types.py", list_types, PAGE))
