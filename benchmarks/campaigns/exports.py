"""Export many decoders, each in a process with a time limit, inject the exports, and print what became of each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from coverage import examine, inject_with_kvsurgeon, quiet
from verification.corpus import Entry

from campaigns.exports_page import Page, as_markdown
from campaigns.results import collect
from campaigns.rows import EXPORTERS, RIGHT, WRONG, Row, best_outcomes, by_name

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
EXPORTED = "exported"
STAGES = {"build": "not built", "run": "not run"}  # every later stage is one of the export


@dataclass(frozen=True, kw_only=True)
class Exports:
    """Decoders that an example exports, and where."""

    example: Path
    folder: Path
    python: str  # interpreter with torch and the packages
    seconds: float  # allowed for an export

    def meta(self, name: str, exporter: str) -> dict[str, object]:
        """Return what `meta.json` says about an export, which is made if there is none."""
        file = self.folder / exporter / name / "meta.json"
        if not file.exists():
            command = [self.python, str(self.example), str(self.folder), name, "--exporter", exporter]
            try:
                subprocess.run(command, capture_output=True, check=False, timeout=self.seconds)
            except subprocess.TimeoutExpired:
                file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                late = {"stage": "export", "error": f"the process died or took more than {self.seconds:.0f} s"}
                file.write_text(json.dumps(late), encoding="utf-8")
        meta: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
        return meta

    def row(self, name: str, exporter: str) -> Row:
        """Return the outcome of one export: how far it came, and whether its injection is right."""
        meta = self.meta(name, exporter)
        stage, reason = str(meta.get("stage")), str(meta.get("error", ""))
        if stage != EXPORTED:
            outcome = STAGES.get(stage, "not exported")
            return Row(name=name, exporter=exporter, outcome=outcome, reason=reason or stage)
        result = examine(Entry(folder=self.folder / exporter / name, meta=meta), inject_with_kvsurgeon)
        outcome = result.verdict
        if meta["expected"] == "refuse":
            outcome = WRONG if result.verdict == RIGHT else "not causal"
        return Row(name=name, exporter=exporter, outcome=outcome, reason=result.reason)


def run(
    description: str | None, example: str, names: Callable[[str], list[str]], page: Page,
    *, exporters: Sequence[str] = EXPORTERS,
) -> int:  # fmt: skip
    """Export the decoders of an example by the exporters it has, inject them, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this decoder; repeatable")
    parser.add_argument("--exporter", action="append", default=[], choices=exporters)
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch and the packages")
    parser.add_argument("--seconds", type=float, default=240.0, help="time allowed for an export")
    parser.add_argument("--json", type=Path, metavar="OUT", help="rows so far, which are kept by the next run")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="the docs page")
    options = parser.parse_args()
    quiet()
    exports = Exports(example=EXAMPLES / example, folder=options.models, python=options.python, seconds=options.seconds)
    known = (
        [Row(**row) for row in json.loads(options.json.read_text())] if options.json and options.json.exists() else []
    )
    done = {(row.name, row.exporter) for row in known}
    tasks = [
        (name, exporter)
        for name in options.only or names(options.python)
        for exporter in options.exporter or exporters
        if (name, exporter) not in done
    ]

    def save(rows: Sequence[Row]) -> None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")

    rows = collect((exports.row(*task) for task in tasks), save if options.json else None, known=known)
    print_table(rows)
    if options.markdown:
        options.markdown.write_text(as_markdown(page, rows), encoding="utf-8")
    return 1 if any(row.outcome == WRONG for row in rows) else 0


def print_table(rows: Sequence[Row]) -> None:
    """Print the outcomes of each decoder, then the reasons, then how many have each outcome by one exporter."""
    print(f"{'decoder':28}", *(f"{exporter:14}" for exporter in EXPORTERS))
    for name, found in by_name(rows).items():
        print(f"{name:28}", *(f"{found[one].outcome if one in found else '':14}" for one in EXPORTERS))
    for row in rows:
        if row.outcome != RIGHT:
            print(f"{row.name} ({row.exporter}): {row.outcome}: {row.reason}")
    best = best_outcomes(rows)
    totals = Counter(best.values()).most_common()
    print(f"\n{len(best)} decoders:", ", ".join(f"{count} {outcome}" for outcome, count in totals))
