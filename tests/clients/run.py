"""Run the client of a target on the folders that `kvsurgeon inject --target` writes, and compare its tokens.

    python tests/clients/run.py genai                       # all required models: see below
    python tests/clients/run.py genai --models DIR [DIR ..] # these models, or folders that hold one each
    python tests/clients/run.py genai --own                 # the exports in tests/corpus

Required are SmolLM2 as exported by examples/smollm2.py with both exporters (`--smollm2 DIR`), with 32 tokens after each
prompt equal to those of transformers, and models of several families of a corpus (`--corpus DIR`).

The client is installed into a separate environment (`--environments`, by default in the temporary folder of the
system). Each model is copied, and its target folder is built and moved to an empty folder; the copy is deleted before
the client runs there, without kvsurgeon and, if possible, without a network.

If the client also fails on the original model without a cache, in a lower opset if necessary, the model is counted as
unsupported: it is no test of the cache.

Exit code: 0 if all required models are equal, 1 if tokens differ or the client fails, 3 if a required model was not
run, 4 if the client cannot be installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cases import encoder_cases, image_cases, small_cases, smollm2_cases, takes_padding
from corpus_models import families
from environments import CLIENTS, DEFAULT_PYTHON, Client
from isolated_run import DECODER, Cases, Outcome, run_isolated

from kvsurgeon.io import find_model

HERE = Path(__file__).parent
OWN = HERE.parent / "corpus"
CORPUS = HERE.parents[2] / "shared" / "corpus"
SMOLLM2 = Path(tempfile.gettempdir()) / "kvsurgeon-smollm2"
EXPORTS = ("torchscript-sdpa", "torchscript-eager", "dynamo-sdpa", "dynamo-eager")
FAMILIES = 12


def main() -> int:
    """Run the client, and return the exit code."""
    options = _options()
    client = CLIENTS[options.client]
    try:
        call, home = client.command(options.environments, options.python)
    except subprocess.CalledProcessError as error:
        print(f"{options.client}: not run: cannot install {' '.join(client.requirements)}: {error}")
        return 4
    runs = _Runs(client, call, home, verify=not options.no_verify)
    for one in _outcomes(runs, options):
        print(one, flush=True)
        runs.outcomes.append(one)
    missing = [] if options.models else list(_missing(runs, options))
    counts = f"{runs.count('equal')} equal, {runs.count('rejected')} rejected, {runs.bad} not equal"
    print(f"{options.client}: {counts}, {runs.count('unsupported')} that the client fails on without a cache too")
    for one in missing:
        print(f"{options.client}: not run: {one}")
    if runs.bad or not runs.count("equal"):
        return 1
    return 3 if missing else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="models, or folders that hold one each")
    parser.add_argument("--own", action="store_true", help="the exports in tests/corpus")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folders GROUP/NAME that hold a model each")
    parser.add_argument("--families", type=int, default=FAMILIES, help="required families of the corpus")
    parser.add_argument("--smollm2", type=Path, default=SMOLLM2, help="output folder of examples/smollm2.py")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "kvsurgeon-clients")
    parser.add_argument("--python", default=DEFAULT_PYTHON, help="Python of the environment")
    parser.add_argument("--no-verify", action="store_true", help="skip verification by kvsurgeon")
    options = parser.parse_args()
    options.environments = options.environments.absolute()
    if options.own:
        options.models += sorted(OWN.glob("*.onnx"))
    return options


class _Runs:
    """One client, and its results so far."""

    def __init__(self, client: Client, call: list[str], home: Path, *, verify: bool) -> None:
        self.client, self.call, self.home, self.verify = client, call, home, verify
        self.outcomes: list[Outcome] = []

    def count(self, verdict: str) -> int:
        return sum(one.verdict == verdict for one in self.outcomes)

    @property
    def bad(self) -> int:
        return sum(one.verdict not in ("equal", "rejected", "unsupported") for one in self.outcomes)

    def small(self, model: Path) -> Outcome:
        client = self.client
        if client.encoder:
            return self._outcome(model, [(case, None) for case in encoder_cases(model, new=client.new)])
        file = model / DECODER if client.embedding else find_model(model)
        padded = client.padded and takes_padding(file)
        cases = [*small_cases(batch=client.batch, padded=padded, chunked=client.chunked, new=client.new)]
        if client.embedding and client.node:
            cases += image_cases(model, new=client.new)
        return self._outcome(model, [(case, None) for case in cases])

    def smollm2(self, folder: Path) -> Outcome:
        return self._outcome(folder, smollm2_cases(folder.parent / "expected.json", chunked=self.client.chunked))

    def _outcome(self, model: Path, cases: Cases) -> Outcome:
        return run_isolated(self.client, self.call, self.home, model, cases, verify=self.verify)


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
            if one.verdict not in ("rejected", "unsupported"):
                break


def _missing(runs: _Runs, options: argparse.Namespace) -> Iterator[str]:
    equal = {one.model for one in runs.outcomes if one.verdict == "equal"}
    for exporter in ("torchscript", "dynamo"):
        if not any(Path(name).name.startswith(f"{exporter}-") for name in equal):
            yield f"SmolLM2 by {exporter} (run examples/smollm2.py DIR --export-only, and give --smollm2 DIR)"
    small = len([name for name in equal if Path(name).name not in EXPORTS])
    if small < options.families:
        yield f"{options.families - small} of {options.families} families (of the corpus in {options.corpus})"


if __name__ == "__main__":
    sys.exit(main())
