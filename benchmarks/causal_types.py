"""Export every causal model type of transformers and inject the exports: built, exported, right, refused why?

    python benchmarks/causal_types.py MODELS [--only TYPE] [--exporter E] [--python PYTHON] [--seconds N] [--json OUT]

`examples/causal_types.py` exports each type by both exporters, in a process of its own with a time limit; `--python`
names an interpreter that has torch and transformers. What MODELS already holds is not exported again. The exports are
injected and compared with the logits of torch as by `coverage.py`. Ends with 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from campaigns.results import collect
from coverage import examine, inject_with_kvsurgeon, quiet
from verification.corpus import Entry

EXAMPLE = Path(__file__).parent.parent / "examples" / "causal_types.py"
EXPORTERS = ("torchscript", "dynamo")
LIST_TYPES = (
    "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as types; print(*types)"
)
EXPORTED, RIGHT, REFUSED, WRONG = "exported", "right", "refused", "wrong"
STAGES = {"build": "not built", "run": "not run"}  # every later stage is one of the export


@dataclass(frozen=True, kw_only=True)
class Row:
    """One export of one type, and what became of it."""

    type: str
    exporter: str
    outcome: str  # right, refused, wrong, not built, not run, not exported, not causal
    reason: str = ""


def list_types(python: str) -> list[str]:
    """Return the causal model types of the installed transformers."""
    done = subprocess.run([python, "-c", LIST_TYPES], capture_output=True, text=True, check=True)
    return sorted(done.stdout.split())


def exported(folder: Path, model_type: str, exporter: str, *, python: str, seconds: float) -> dict[str, object]:
    """Return what `meta.json` says about the export of a type, which is made if there is none."""
    file = folder / exporter / model_type / "meta.json"
    if not file.exists():
        command = [python, str(EXAMPLE), str(folder), model_type, "--exporter", exporter]
        try:
            subprocess.run(command, capture_output=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            late = {"stage": "export", "error": f"the process died or took more than {seconds:.0f} s"}
            file.write_text(json.dumps(late), encoding="utf-8")
    meta: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return meta


def row_of(folder: Path, model_type: str, exporter: str, *, python: str, seconds: float) -> Row:
    """Return the outcome of one export: how far it came, and whether its injection is right."""
    meta = exported(folder, model_type, exporter, python=python, seconds=seconds)
    stage, reason = str(meta.get("stage")), str(meta.get("error", ""))
    if stage != EXPORTED:
        outcome = STAGES.get(stage, "not exported")
        return Row(type=model_type, exporter=exporter, outcome=outcome, reason=reason or stage)
    result = examine(Entry(folder=folder / exporter / model_type, meta=meta), inject_with_kvsurgeon)
    outcome = result.verdict
    if meta["expected"] == "refuse":
        outcome = WRONG if result.verdict == RIGHT else "not causal"
    return Row(type=model_type, exporter=exporter, outcome=outcome, reason=result.reason)


def print_table(rows: Sequence[Row]) -> None:
    """Print the outcomes of each type, then the reasons, then how many types have each outcome by one exporter."""
    by_type: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_type.setdefault(row.type, {})[row.exporter] = row
    print(f"{'type':28}", *(f"{exporter:14}" for exporter in EXPORTERS))
    for name, found in by_type.items():
        print(f"{name:28}", *(f"{found[one].outcome if one in found else '':14}" for one in EXPORTERS))
    for row in rows:
        if row.outcome != RIGHT:
            print(f"{row.type} ({row.exporter}): {row.outcome}: {row.reason}")
    best = Counter(_best([row.outcome for row in found.values()]) for found in by_type.values())
    print(f"\n{len(by_type)} types:", ", ".join(f"{count} {outcome}" for outcome, count in best.most_common()))


def _best(outcomes: Sequence[str]) -> str:
    """Return the outcome of a type: wrong if any is, right if one is, refused if one is."""
    return next((one for one in (WRONG, RIGHT, REFUSED) if one in outcomes), outcomes[-1])


def main() -> int:
    """Export, inject, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("--only", action="append", default=[], metavar="TYPE", help="only this type; repeatable")
    parser.add_argument("--exporter", action="append", default=[], choices=EXPORTERS)
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--seconds", type=float, default=240.0, help="time allowed for an export")
    parser.add_argument("--json", type=Path, metavar="OUT", help="rows so far, which are kept by the next run")
    options = parser.parse_args()
    quiet()
    known = (
        [Row(**row) for row in json.loads(options.json.read_text())] if options.json and options.json.exists() else []
    )
    done = {(row.type, row.exporter) for row in known}
    tasks = [
        (name, exporter)
        for name in options.only or list_types(options.python)
        for exporter in options.exporter or EXPORTERS
        if (name, exporter) not in done
    ]

    def save(rows: Sequence[Row]) -> None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")

    found = (row_of(options.models, *task, python=options.python, seconds=options.seconds) for task in tasks)
    rows = collect(found, save if options.json else None, known=known)
    print_table(rows)
    return 1 if any(row.outcome == WRONG for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
