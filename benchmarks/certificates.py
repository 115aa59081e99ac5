"""Certify every model of a corpus, confirm all certificates, and confirm none that was tampered with.

    python benchmarks/certificates.py FOLDER... [--group G] [--only NAME] [--sample N] [--effort E] [--tampered N]
                                      [--seed S] [--json OUT]

Each model is injected with a certificate, which must be confirmed. Of some of them (`--tampered`), copies of original,
result and certificate are changed in every way of `mutating/tampering.py`; no copy may be confirmed.
Ends with 1 if a certificate is not confirmed, one of a changed copy is, or anything raises another error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from mutating.tampering import FILES, FORMS, STATEMENTS, Certified
from verification.corpus import Entry, corpus_parser, find_entries, spread_sample

import kvsurgeon
from kvsurgeon.errors import KvsurgeonError

FINE = frozenset({"confirmed", "refused", "found", "no place"})


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one certificate."""

    name: str
    change: str
    verdict: str
    reason: str = ""


def main() -> int:
    arguments = _arguments()
    warnings.simplefilter("ignore")
    found = find_entries(arguments.folders, groups=arguments.group, names=arguments.only)
    entries = [one for one in spread_sample(found, arguments.sample) if one.expected != "refuse" and not one.damaged]
    with tempfile.TemporaryDirectory() as work:
        results = [_printed(certify(one, Path(work) / one.label, arguments.effort)) for one in entries]
        certified = [one.name for one in results if one.verdict == "confirmed"]
        for name in certified[:: max(1, len(certified) // max(1, arguments.tampered))][: arguments.tampered]:
            results += map(_printed, tampered(Path(work) / name, name, arguments.seed))
    for kind in ("certificates", "changed copies"):
        counts = Counter(one.verdict for one in results if (one.change == "") == (kind == "certificates"))
        print(f"{kind}: {counts.total()}, " + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    kinds = {one.change.partition(":")[0] for one in results if one.verdict == "found"}
    print(f"kinds of changes that were found: {len(kinds)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=1), "utf-8")
    return 0 if all(one.verdict in FINE for one in results) else 1


def certify(entry: Entry, folder: Path, effort: str) -> Result:
    """Copy a model, inject it with a certificate, and confirm that."""
    shutil.copytree(entry.folder, folder / "original", ignore=shutil.ignore_patterns("io.npz", "*with_past*"))
    certificate, result = folder / "certificate.json", folder / "result"
    try:
        kvsurgeon.inject(folder / "original", result, effort=effort, certificate=certificate)
    except KvsurgeonError as error:
        return Result(name=entry.label, change="", verdict="refused", reason=str(error))
    except Exception as error:
        return Result(name=entry.label, change="", verdict="CRASHED", reason=repr(error))
    return _confirmed(entry.label, "", folder, good="confirmed", bad="NOT CONFIRMED")


def tampered(folder: Path, name: str, seed: int) -> Iterator[Result]:
    """Yield the result of each way to change a certified model."""
    changes: list[tuple[str, Callable[[Certified], object]]] = []
    for kind, change in (*STATEMENTS.items(), *FORMS.items()):
        changes.append((kind, lambda given, change=change: given.edit(change) or "done"))
    for kind, (change, count) in FILES.items():
        changes += [(f"{kind}: {number}", change) for number in range(count)]
    for kind, change in changes:
        with tempfile.TemporaryDirectory() as work:
            copy = Path(work) / "copy"
            shutil.copytree(folder, copy)
            given = Certified(
                original=copy / "original" / "model.onnx",
                result=copy / "result" / "model.onnx",
                certificate=copy / "certificate.json",
                random=Random(f"{seed} {name} {kind}"),
            )
            if change(given) is None:
                yield Result(name=name, change=kind, verdict="no place")
            else:
                yield _confirmed(name, kind, copy, good="CONFIRMED", bad="found")


def _confirmed(name: str, change: str, folder: Path, *, good: str, bad: str) -> Result:
    try:
        kvsurgeon.confirm(folder / "certificate.json", folder / "result")
    except KvsurgeonError as error:
        return Result(name=name, change=change, verdict=bad, reason=f"{error} [{error.code}]")
    except Exception as error:
        return Result(name=name, change=change, verdict="CRASHED", reason=repr(error))
    return Result(name=name, change=change, verdict=good)


def _printed(result: Result) -> Result:
    print(f"{result.verdict:>13}  {result.name}  {result.change}  {result.reason[:200]}", file=sys.stderr, flush=True)
    return result


def _arguments() -> argparse.Namespace:
    parser = corpus_parser(__doc__)
    parser.add_argument("--effort", default="quick", choices=("quick", "normal", "thorough"))
    parser.add_argument("--tampered", type=int, default=1, help="number of models that are tampered with")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
