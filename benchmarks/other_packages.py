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


def list_decoders(python: str) -> list[str]:
    """Return the decoders of the example."""
    command = [python, str(EXAMPLES / "other_packages.py"), "--list"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


if __name__ == "__main__":
    sys.exit(run(__doc__, "other_packages.py", list_decoders))
