"""Run a real client on folders that `kvsurgeon.inject(..., target=...)` wrote, and compare what it says.

    python tests/clients/run.py optimum                                  # the exports in tests/corpus
    python tests/clients/run.py genai --models DIR [DIR ...]             # folders of other models
    python tests/clients/run.py openvino --smollm2 DIR                   # what examples/smollm2.py made there

The client is installed into an environment of its own (`--environments`, by default a folder of the system's
temporary one). Each target folder is written, copied alone into an empty folder, and run from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case, answer, small_cases, smollm2_cases
from environments import CLIENTS, DEFAULT_PYTHON, Client

import kvsurgeon
from kvsurgeon.errors import KvsurgeonError, Refused
from kvsurgeon.io import find_model

OWN = Path(__file__).parents[1] / "corpus"
EXPORTS = ("torchscript-sdpa", "torchscript-eager", "dynamo-sdpa", "dynamo-eager")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out of one model: "equal", "different", "refused" or "failed", and why."""

    model: str
    verdict: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:9} {self.model:44} {self.details}".rstrip()


def main() -> int:
    """Run what the command line asks for; the exit code is 0 if all that was not refused is equal."""
    options = _options()
    client = CLIENTS[options.client]
    call, home = client.command(options.environments, options.python)
    outcomes = []
    for outcome in _outcomes(client, call, home, options):
        print(outcome, flush=True)
        outcomes.append(outcome)
    counts = {verdict: sum(one.verdict == verdict for one in outcomes) for verdict in ("equal", "refused")}
    bad = len(outcomes) - sum(counts.values())
    print(f"{options.client}: {counts['equal']} equal, {counts['refused']} refused, {bad} not equal")
    return 1 if bad or not counts["equal"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="models, or folders that hold one each")
    parser.add_argument("--smollm2", type=Path, help="where examples/smollm2.py put its exports and expected.json")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "kvsurgeon-clients")
    parser.add_argument("--python", default=DEFAULT_PYTHON, help="the Python of the client's environment")
    parser.add_argument("--unjudged", action="store_true", help="leave all of the judging to the client")
    options = parser.parse_args()
    options.environments = options.environments.absolute()
    if not options.models and options.smollm2 is None:
        options.models = sorted(OWN.glob("*.onnx"))
    return options


def _outcomes(client: Client, call: list[str], home: Path, options: argparse.Namespace) -> Iterator[Outcome]:
    cases = list(small_cases(batch=client.batch, padded=client.padded, chunked=client.chunked, new=client.new))
    judged = {"verify": not options.unjudged}
    for model in options.models:
        yield _outcome(client, call, home, model, [(case, None) for case in cases], judged)
    if options.smollm2 is not None:
        known = smollm2_cases(options.smollm2 / "expected.json", chunked=client.chunked)
        for name in EXPORTS:
            if (options.smollm2 / name).is_dir():
                yield _outcome(client, call, home, options.smollm2 / name, known, judged)


def _outcome(
    client: Client,
    call: list[str],
    home: Path,
    model: Path,
    cases: list[tuple[Case, list[list[int]] | None]],
    wanted: Mapping[str, Any],
) -> Outcome:
    name = model.stem if model.suffix else "/".join(model.parts[-2:])
    with tempfile.TemporaryDirectory(prefix="kvsurgeon-client-") as scratch:
        made, alone = Path(scratch) / "made", Path(scratch) / "alone"
        try:
            kvsurgeon.inject(model, made, target=client.target, **wanted)
        except Refused as error:
            return Outcome(model=name, verdict="refused", details=str(error))
        except KvsurgeonError as error:
            return Outcome(model=name, verdict="failed", details=f"inject: {error}")
        shutil.copytree(made, alone)
        shutil.rmtree(made)
        expected = [said or answer(find_model(model), case) for case, said in cases]
        said_anywhere = {token for rows in expected for row in rows for token in row}
        unused = next(token for token in range(len(said_anywhere) + 1) if token not in said_anywhere)
        asked = json.dumps({"cases": [case.asked() for case, _ in cases], "unused": unused})
        ran = subprocess.run(
            [*call, str(alone), *client.arguments],
            input=asked,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=home,
        )
    if ran.returncode:
        return Outcome(model=name, verdict="failed", details=_last_words(ran.stderr))
    found = json.loads(ran.stdout.splitlines()[-1])["answers"]
    wrong = [
        f"{case.name}: expected {want}, found {have}"
        for (case, _), want, have in zip(cases, expected, found, strict=True)
        if want != have
    ]
    tokens = sum(len(row) for rows in expected for row in rows)
    return Outcome(
        model=name,
        verdict="different" if wrong else "equal",
        details="; ".join(wrong) or f"{len(cases)} cases, {tokens} tokens",
    )


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[:400]


if __name__ == "__main__":
    sys.exit(main())
