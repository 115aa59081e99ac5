"""Inspects and injects the exports of `examples/real_configs.py`, and compares past the window with the original.

    python examples/real_configs.py MODELS
    python benchmarks/real_configs.py MODELS [--only NAME] [--json OUT] [--markdown OUT] [--skip-comparison]

For each model: `inspect --json` against `facts.json`, its time and peak memory; `inject` with verification, its exit
code, time and peak memory; and the injected model against the original at the window and 300 tokens more.
Ends with 1 if a fact is wrong, a bound is exceeded, an injection fails or a result differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime as ort
from verification.chunked_comparison import WRONG, Candidate, Chunking, Reference, compare

INSPECT_SECONDS, INSPECT_MEGABYTES = 3.0, 700.0
INJECT_MEGABYTES_MORE = 400.0  # than a session of the original needs, for the same texts
PAST_WINDOW = 300  # tokens
SHORT = 700  # tokens compared where there is no window
LONGEST_LIMIT = 4096  # tokens: on both sides of one, for the memory that a comparison takes
SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Process:
    """A finished command."""

    code: int
    output: str
    message: str
    seconds: float
    cpu_seconds: float
    megabytes: float  # largest resident memory


@dataclass(frozen=True, kw_only=True)
class Row:
    """All that was measured of one model."""

    name: str
    inspect_seconds: float
    inspect_cpu_seconds: float
    inspect_megabytes: float
    facts: str  # what is wrong; empty if all are right
    inject_code: int
    inject_seconds: float
    inject_megabytes: float
    session_megabytes: float  # of the original
    message: str
    compared: str

    @property
    def least_seconds(self) -> float:
        """Seconds of an inspection on an idle machine, at most."""
        return min(self.inspect_seconds, self.inspect_cpu_seconds)

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        return [
            *(["facts"] if self.facts else []),
            *(["inspect time"] if self.least_seconds > INSPECT_SECONDS else []),
            *(["inspect memory"] if self.inspect_megabytes > INSPECT_MEGABYTES else []),
            *(["inject"] if self.inject_code else []),
            *(["inject memory"] if self.inject_megabytes > self.session_megabytes + INJECT_MEGABYTES_MORE else []),
            *(["result"] if self.compared.split(" ")[0] == WRONG else []),
        ]


def run(command: Sequence[str]) -> Process:
    """Run a command; measure its time and memory."""
    script = (
        "import json, resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "cpu = used.ru_utime + used.ru_stime\n"
        "print(json.dumps([done.returncode, done.stdout, done.stderr, cpu, used.ru_maxrss]))\n"
    )
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *command], capture_output=True, text=True, timeout=SECONDS, check=True
        )
    except subprocess.TimeoutExpired:
        message = f"not done after {SECONDS} s"
        return Process(code=-1, output="", message=message, seconds=SECONDS, cpu_seconds=SECONDS, megabytes=0.0)
    code, output, message, cpu, peak = json.loads(done.stdout)
    return Process(
        code=code,
        output=output,
        message=message.strip(),
        seconds=time.perf_counter() - start,
        cpu_seconds=cpu,
        megabytes=peak / 1024,
    )


def wrong_facts(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """Yield each fact about a layer that is not as in the configuration."""
    if len(found["attentions"]) != len(expected["layers"]):
        yield f"{len(found['attentions'])} layers instead of {len(expected['layers'])}"
        return
    for layer, (one, facts) in enumerate(zip(found["attentions"], expected["layers"], strict=True)):
        seen = {
            "kv_heads": one["kv_heads"],
            "head_dim": one["head_dim"],
            "rotary_dim": one["rotary_dim"],
            "window": one["mask"]["window"],
        }
        for name, value in facts.items():
            if seen[name] != value:
                yield f"layer {layer}: {name} {seen[name]} instead of {value}"
    if found["max_length"] != expected["max_length"]:
        yield f"max_length {found['max_length']} instead of {expected['max_length']}"


def session_megabytes(path: Path, facts: dict[str, Any]) -> float:
    """Return the peak memory of a process that runs the original on two short texts, and on one past its window."""
    script = (
        "import sys; sys.path[:0] = [sys.argv[3]]\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from verification.chunked_comparison import Reference\n"
        "reference = Reference(Path(sys.argv[1]), arena=False)\n"
        "reference(np.ones((2, 140), np.int64))\n"
        "reference(np.ones((1, int(sys.argv[2])), np.int64))\n"
    )
    longest = max((layer["window"] or 0 for layer in facts["layers"]), default=0) + 8
    return run([sys.executable, "-c", script, str(path), str(longest), str(Path(__file__).parent)]).megabytes


def compared(original: Path, injected: Path, facts: dict[str, Any]) -> str:
    """Return how the injected model compares with the original past its window, in a text of one batch."""
    windows = [layer["window"] for layer in facts["layers"] if layer["window"]]
    end = max(windows) + PAST_WINDOW if windows else SHORT
    end = min(end, facts["max_length"] or end)
    steps = [(window + more, False) for window in windows for more in (-1, 0, 1)]
    steps = sorted({(5, True), (64, True), (65, True), *steps, (end - 3, False), (end - 2, False), (end, True)})
    chunking = Chunking(batch=1, steps=tuple(steps))
    at_once = Chunking(batch=1, steps=((end - 1, False), (end, True)))
    plan = [chunking, at_once]
    limit = facts["max_length"]
    if limit and limit <= LONGEST_LIMIT:
        plan.append(Chunking(batch=1, steps=((limit - 1, False), (limit, True), (limit + 1, True))))
    candidate = Candidate(injected, onnx.load(original, load_external_data=False), arena=False)
    verdict = compare(Reference(original, arena=False), candidate, plan)
    return f"{verdict.verdict} at {end} tokens" + (f": {verdict.reason}" if verdict.reason else "")


def measure(folder: Path, *, skip: bool) -> Row:
    """Inspect, inject and compare one model."""
    command = str(Path(sys.executable).with_name("kvsurgeon"))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    inspected = run([command, "inspect", str(folder), "--json"])
    if inspected.code:
        wrong = inspected.message.splitlines()[-1] if inspected.message else f"exit {inspected.code}"
    else:
        wrong = "; ".join(wrong_facts(json.loads(inspected.output), facts))
    with TemporaryDirectory(dir=folder.parent) as scratch:
        output = Path(scratch) / "injected"
        done = run([command, "inject", str(folder), "-o", str(output)])
        last = (done.message or done.output).strip().splitlines()[-1:] or [""]
        result = "not compared"
        if done.code == 0 and not skip:
            result = compared(folder / "model.onnx", next(output.glob("*.onnx")), facts)
    return Row(
        name=folder.name,
        inspect_seconds=round(inspected.seconds, 2),
        inspect_cpu_seconds=round(inspected.cpu_seconds, 2),
        inspect_megabytes=round(inspected.megabytes),
        facts=wrong,
        inject_code=done.code,
        inject_seconds=round(done.seconds, 1),
        inject_megabytes=round(done.megabytes),
        session_megabytes=round(session_megabytes(folder / "model.onnx", facts)),
        message="" if done.code == 0 else last[0],
        compared=result,
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| model | inspect s | of CPU | MB | facts | inject exit | s | MB | session MB | past the window |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        facts = row.facts or "right"
        result = row.compared if row.inject_code == 0 else row.message
        cells = [row.name, row.inspect_seconds, row.inspect_cpu_seconds, row.inspect_megabytes, facts, row.inject_code]
        cells += [row.inject_seconds, row.inject_megabytes, row.session_megabytes, result]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure all, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder that examples/real_configs.py wrote")
    parser.add_argument("--only", action="append", metavar="NAME", help="only models whose name contains this")
    parser.add_argument("--skip-comparison", action="store_true", help="do not compare past the window")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    options = parser.parse_args()
    ort.set_default_logger_severity(4)
    rows: list[Row] = []
    for facts in sorted(options.models.glob("*/facts.json")):
        if options.only and not any(name in facts.parent.name for name in options.only):
            continue
        rows.append(measure(facts.parent, skip=options.skip_comparison))
        print(f"{rows[-1].name}: {', '.join(rows[-1].faults) or 'as it should be'}", flush=True)
        if options.json:
            listed = [{**asdict(row), "faults": row.faults} for row in rows]
            options.json.write_text(json.dumps(listed, indent=1), encoding="utf-8")
        if options.markdown:
            options.markdown.write_text(table(rows) + "\n", encoding="utf-8")
    print("\n" + table(rows))
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
