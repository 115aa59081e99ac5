"""Verify caches that are wrong in some calls only, and say which faults the verifier misses.

    python benchmarks/verifier.py [MODEL] [--sample 60] [--seed S] [--effort normal] [--json OUT]

MODEL is a decoder with inputs `input_ids` and `attention_mask`; the default is an export of the tests. It is injected,
and a fault is added to the result (see verification/faults.py): kind of call x place x size. Ends with 1 if the
correct cache is rejected, or a fault of at least 1e-2 is accepted.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

import onnx
from verification.faults import Fault, all_faults, with_fault

from kvsurgeon import io
from kvsurgeon.parity import Effort, verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.workflow.pipeline import Pipeline

DEFAULT = Path(__file__).parents[1] / "tests" / "corpus" / "llama_torchscript_sdpa.onnx"
LARGE = 1e-2  # size of a fault that every verification must notice


def missed_faults(path: Path, faults: list[Fault], seed: int, effort: Effort) -> list[Fault]:
    """Return the faults that are accepted.

    Raises:
        SystemExit: The correct cache is rejected.
    """
    reference = onnx.load(path)
    right = io.to_proto(Pipeline((Inject(),)).run(reference).model)
    report = verify(reference, right, seed=seed, effort=effort, threads=1)
    print(f"{path}: {report.verdict}, error {report.error:.1e}, {report.coverage}")
    if report.verdict != "same":
        raise SystemExit("the correct cache is rejected")
    missed = []
    for number, fault in enumerate(faults):
        found = verify(reference, with_fault(right, fault), seed=seed + number, effort=effort, threads=1, explain=False)
        if found.verdict != "different":
            missed.append(fault)
            print(f"missed: {fault} (error {found.error:.1e})", flush=True)
    return missed


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--sample", type=int, help="number of faults; all without it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", choices=("quick", "normal", "thorough"), default="normal")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    faults = list(all_faults())
    if options.sample:
        faults = random.Random(options.seed).sample(faults, options.sample)
    missed = missed_faults(options.model, faults, options.seed, options.effort)
    by_size = Counter(fault.size for fault in missed)
    print(f"{len(faults)} faults, {len(missed)} missed: {dict(by_size)}")
    if options.json:
        document = {"faults": len(faults), "missed": [str(fault) for fault in missed]}
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return int(any(fault.size >= LARGE for fault in missed))


if __name__ == "__main__":
    sys.exit(main())
