"""Runs a target's own client on what `kvsurgeon inject --target` writes, and compares its tokens.

    python tests/clients/run.py genai                       # all that is to be shown of a client: see below
    python tests/clients/run.py genai --models DIR [DIR ..] # these models, or folders that hold one each
    python tests/clients/run.py genai --own                 # the exports in tests/corpus

All that is to be shown: SmolLM2 as examples/smollm2.py exported it, by both exporters (`--smollm2 DIR`), 32 tokens
after each prompt equal to those of transformers; and models of a corpus (`--corpus DIR`), of so many families.

The client is installed into an environment of its own (`--environments`, by default a folder of the system's
temporary one). Each model is copied, its target folder written and moved alone into an empty place; the copy of the
source is gone before the client runs from there, without kvsurgeon and, where that can be had, without a network.

A model that the client already fails on, or answers otherwise, without a cache and with nothing done to it but a lower
opset is counted apart, as unfit: it says nothing of the cache.

Ends with 0 if all was shown, 1 if a client's tokens differ or it fails, 3 if nothing differs but something of what is
to be shown was not run, 4 if the client cannot be installed from here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alone import Asked, Outcome, outcome
from cases import small_cases, smollm2_cases, takes_padding
from choosing import families
from environments import CLIENTS, DEFAULT_PYTHON, Client

from kvsurgeon.io import find_model

HERE = Path(__file__).parent
OWN = HERE.parent / "corpus"
CORPUS = HERE.parents[2] / "shared" / "corpus"
SMOLLM2 = Path(tempfile.gettempdir()) / "kvsurgeon-smollm2"
EXPORTS = ("torchscript-sdpa", "torchscript-eager", "dynamo-sdpa", "dynamo-eager")
FAMILIES = 12


def main() -> int:
    """Run what the command line asks for, and return the exit code."""
    options = _options()
    client = CLIENTS[options.client]
    try:
        call, home = client.command(options.environments, options.python)
    except subprocess.CalledProcessError as error:
        print(f"{options.client}: not run: cannot install {' '.join(client.requirements)}: {error}")
        return 4
    runs = _Runs(client, call, home, judged=not options.unjudged)
    for one in _outcomes(runs, options):
        print(one, flush=True)
        runs.outcomes.append(one)
    missing = [] if options.models else list(_missing(runs, options))
    unfit = f", {runs.count('unfit')} that the client fails on without a cache too" if runs.count("unfit") else ""
    counted = f"{runs.count('equal')} equal, {runs.count('refused')} refused, {runs.bad} not equal"
    print(f"{options.client}: {counted}{unfit}")
    for what in missing:
        print(f"{options.client}: not shown: {what}")
    if runs.bad or not runs.count("equal"):
        return 1
    return 3 if missing else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="models, or folders that hold one each")
    parser.add_argument("--own", action="store_true", help="the exports in tests/corpus")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folders GROUP/NAME that hold a model each")
    parser.add_argument("--families", type=int, default=FAMILIES, help="families of the corpus that are to be equal")
    parser.add_argument("--smollm2", type=Path, default=SMOLLM2, help="where examples/smollm2.py put its exports")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "kvsurgeon-clients")
    parser.add_argument("--python", default=DEFAULT_PYTHON, help="the Python of the client's environment")
    parser.add_argument("--unjudged", action="store_true", help="leave all of the judging to the client")
    options = parser.parse_args()
    options.environments = options.environments.absolute()
    if options.own:
        options.models += sorted(OWN.glob("*.onnx"))
    return options


class _Runs:
    """One client, and what came out so far."""

    def __init__(self, client: Client, call: list[str], home: Path, *, judged: bool) -> None:
        self.client, self.call, self.home, self.judged = client, call, home, judged
        self.outcomes: list[Outcome] = []

    def count(self, verdict: str) -> int:
        return sum(one.verdict == verdict for one in self.outcomes)

    @property
    def bad(self) -> int:
        return sum(one.verdict not in ("equal", "refused", "unfit") for one in self.outcomes)

    def small(self, model: Path) -> Outcome:
        client = self.client
        padded = client.padded and takes_padding(find_model(model))
        cases = small_cases(batch=client.batch, padded=padded, chunked=client.chunked, new=client.new)
        return self._outcome(model, [(case, None) for case in cases])

    def smollm2(self, folder: Path) -> Outcome:
        return self._outcome(folder, smollm2_cases(folder.parent / "expected.json", chunked=self.client.chunked))

    def _outcome(self, model: Path, cases: Asked) -> Outcome:
        return outcome(self.client, self.call, self.home, model, cases, judged=self.judged)


def _outcomes(runs: _Runs, options: argparse.Namespace) -> Iterator[Outcome]:
    if options.models:
        yield from map(runs.small, options.models)
        return
    for name in EXPORTS:
        if (options.smollm2 / name).is_dir():
            yield runs.smollm2(options.smollm2 / name)
    equal = 0
    for family in families(options.corpus):
        if equal == options.families:
            return
        for model in family:
            one = runs.small(model)
            yield one
            equal += one.verdict == "equal"
            if one.verdict not in ("refused", "unfit"):
                break


def _missing(runs: _Runs, options: argparse.Namespace) -> Iterator[str]:
    shown = {one.model for one in runs.outcomes if one.verdict == "equal"}
    for exporter in ("torchscript", "dynamo"):
        if not any(Path(name).name.startswith(f"{exporter}-") for name in shown):
            yield f"SmolLM2 by {exporter} (make it with examples/smollm2.py DIR --export-only, and say --smollm2 DIR)"
    small = len([name for name in shown if Path(name).name not in EXPORTS])
    if small < options.families:
        yield f"{options.families - small} of {options.families} families (of the corpus in {options.corpus})"


if __name__ == "__main__":
    sys.exit(main())
