"""Export seven families at a fixed length of 128, as SparseML does, and inject the exports: right, refused why?

    python benchmarks/fixed_length.py MODELS [--only FAMILY] [--python PYTHON] [--seconds N] [--json OUT]

`examples/fixed_length.py` makes the exports; `--python` names an interpreter that has torch and transformers 4.30.2.
Otherwise as `causal_types.py`. Ends with 1 if a result is wrong.
"""

from __future__ import annotations

import subprocess
import sys

from campaigns.exports import EXAMPLES, run
from campaigns.exports_page import Page

PAGE = Page(
    title="Exports of a fixed length",
    text="`benchmarks/fixed_length.py` exports seven families at a length of 128, injects the export and compares it "
    "with the logits of torch.",
    command="python benchmarks/fixed_length.py MODELS --markdown OUT",
)


def list_families(python: str) -> list[str]:
    """Return the families of the example."""
    command = [python, str(EXAMPLES / "fixed_length.py"), "--list"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(run(__doc__, "fixed_length.py", list_families, PAGE, exporters=("torchscript",)))
