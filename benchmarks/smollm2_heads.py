"""Gives SmolLM2 other key and value heads, before `inject` and after it, and holds it against what transformers writes.

    python benchmarks/smollm2_heads.py OUT/dynamo-sdpa OUT/torchscript-sdpa [--json FILE]

OUT is what examples/smollm2.py writes. Replicated and expanded, each must write the tokens of OUT/expected.json, and
give the logits of the model without a cache on all of them. Merged and shared, each says how much it lost. A count
that cannot be must be refused with those that can.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import kvsurgeon
from kvsurgeon.errors import UsageError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Pass
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.passes.heads.share_kv_layers import ShareKvLayers
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

HEADS = 9  # query heads of SmolLM2-135M
BOUND = 1e-4  # of the spread of the logits
EXACT: dict[str, tuple[Pass, ...]] = {
    "replicate 3, inject": (ReplicateKvHeads(repeat=3), Inject()),
    "inject, replicate 3": (Inject(), ReplicateKvHeads(repeat=3)),
    "expand, inject": (ExpandGqa(), Inject()),
    "inject, expand": (Inject(), ExpandGqa()),
}
LOSSY: dict[str, tuple[Pass, ...]] = {
    "merge 1": (MergeKvHeads(kv_heads=1),),
    "share 10": (ShareKvLayers(kv_layers=10),),
}
LEGAL = "expected one of 3, 9 KV heads"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result of one pipeline on a model."""

    model: str
    pipeline: str
    found: str
    right: bool


def exact(folder: Path, expected: list[dict[str, Any]], name: str) -> Row:
    """Make an exact change; compare tokens and logits."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        run_and_save(folder, Pipeline(EXACT[name]), Path(made) / "model", verify=False)
        result = Path(made) / "model"
        same = sum(_writes(result, record) for record in expected)
        session = _session(result)
        heads = {one.shape[1] for one in session.get_inputs() if one.name.startswith("past_key_values.")}
        original = _session(folder)
        apart = max(_apart(original, session, record) for record in expected)
    return Row(
        model=folder.name,
        pipeline=name,
        found=f"{same} of {len(expected)} texts of 64 tokens, logits {apart:.1e}, cache heads {sorted(heads)}",
        right=same == len(expected) and apart <= BOUND and heads == {HEADS},
    )


def _writes(folder: Path, record: dict[str, Any]) -> bool:
    count = len(record["tokens"])
    written = kvsurgeon.generate(folder, record["prompt"], max_new_tokens=count, stop=(), threads=1)
    return list(written.tokens[0]) == record["tokens"]


def _session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])


def _apart(original: ort.InferenceSession, result: ort.InferenceSession, record: dict[str, Any]) -> float:
    """Largest difference of the logits of all tokens, over the spread; the result gets them in two calls."""
    tokens = np.array([record["input_ids"] + record["tokens"]])
    mask = np.ones_like(tokens)
    (reference,) = original.run(["logits"], {"input_ids": tokens, "attention_mask": mask})
    pasts = [one for one in result.get_inputs() if one.name.startswith("past_key_values.")]
    cache = {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in pasts}
    presents = [one.name.replace("past_key_values.", "present.") for one in pasts]
    answers, first = [], len(record["input_ids"])
    for start, end in ((0, first), (first, tokens.shape[1])):
        feeds = {"input_ids": tokens[:, start:end], "attention_mask": mask[:, :end], **cache}
        answer, *new = result.run(["logits", *presents], feeds)
        answers.append(answer)
        cache = dict(zip(cache, new, strict=True))
    return float(np.abs(np.concatenate(answers, axis=1) - reference).max() / np.ptp(reference))


def lossy(folder: Path, name: str) -> Row:
    """Make a change that is not exact; take down what its report says."""
    loss = run_and_save(folder, Pipeline(LOSSY[name])).loss
    return Row(model=folder.name, pipeline=name, found=str(loss), right=loss is not None and loss.kl_divergence > 0)


def refused(folder: Path) -> Row:
    """Ask for a count that cannot be."""
    try:
        run_and_save(folder, Pipeline((ReplicateKvHeads(repeat=2),)), verify=False)
    except UsageError as error:
        return Row(model=folder.name, pipeline="replicate 2", found=str(error), right=LEGAL in str(error))
    return Row(model=folder.name, pipeline="replicate 2", found="not refused", right=False)


def examined(folder: Path) -> Iterator[Row]:
    """Do all of it."""
    expected = json.loads((folder.parent / "expected.json").read_text(encoding="utf-8"))
    yield refused(folder)
    for name in EXACT:
        yield exact(folder, expected, name)
    for name in LOSSY:
        yield lossy(folder, name)


def main() -> int:
    """Print a table; exit code 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows: list[Row] = []
    for folder in options.folders:
        for row in examined(folder):
            rows.append(row)
            print(f"{row.model:18} {row.pipeline:20} {'right' if row.right else 'WRONG':6} {row.found}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return int(not all(row.right for row in rows))


if __name__ == "__main__":
    sys.exit(main())
