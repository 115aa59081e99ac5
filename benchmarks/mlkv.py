"""Gives a model of 12 layers with 12 heads the six configurations of the paper on multi-layer key-value heads (MLKV).

    python benchmarks/mlkv.py FOLDER... [--json OUT]        # folders that examples/pythia.py writes
    python benchmarks/mlkv.py FOLDER... --loss              # parameters, and KL divergence by method

Each is made by merge-kv-heads, share-kv-layers or both. It then gets a cache, and is verified with it, whole, token by
token and in ragged chunks, against itself without: two sequences, one of them padded on the left.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from verification.corpus import Case
from verification.independent_verifier import EXACT, failures, open_session, read_contract, score_case

from kvsurgeon import io
from kvsurgeon.parity import measure_loss
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Pass, Subject
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.share_kv_layers import ShareKvLayers
from kvsurgeon.workflow.pipeline import Pipeline

HEADS, LAYERS = 12, 12
TOKENS, PADDING = 19, 4
LOSS_TOKENS = 2048  # half of them to calibrate on, 512 of the others to measure


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of the paper's table."""

    name: str
    kv_heads: int = HEADS  # of each layer that has any
    kv_layers: int = LAYERS

    @property
    def total(self) -> int:
        """Key heads of the whole model."""
        return self.kv_heads * self.kv_layers

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Passes that derive it from multi-head attention, by means."""
        return self.derived("mean", "mean")

    def derived(self, merging: Literal["pca", "mean"], sharing: Literal["least-squares", "mean"]) -> tuple[Pass, ...]:
        """Passes that derive it from multi-head attention, by these methods."""
        merge = (MergeKvHeads(kv_heads=self.kv_heads, method=merging),) if self.kv_heads < HEADS else ()
        share = (ShareKvLayers(kv_layers=self.kv_layers, method=sharing),) if self.kv_layers < LAYERS else ()
        return (*merge, *share)


CONFIGURATIONS = (
    Configuration(name="MHA-144"),
    Configuration(name="GQA-48", kv_heads=4),
    Configuration(name="MLKV-48", kv_layers=4),
    Configuration(name="MQA-12", kv_heads=1),
    Configuration(name="MLKV-12", kv_heads=3, kv_layers=4),
    Configuration(name="MLKV-2", kv_heads=1, kv_layers=2),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result of one configuration of a model."""

    model: str
    name: str
    expected: int  # key heads of the whole model
    heads: int  # those of the cache inputs
    bytes_per_token: int  # of the cache
    error: float  # with its cache against itself without, over the spread of the logits
    changed: float  # without a cache, against the model that was given, likewise
    wrong: str


def run(path: Path, passes: Sequence[Pass]) -> onnx.ModelProto:
    """Return the model after these passes."""
    subject = Subject.of(path)
    return io.to_proto(Pipeline(tuple(passes)).run(subject.model, folder=subject.folder).model)


def questions(vocabulary: int) -> dict[str, np.ndarray]:
    """Return tokens and mask of two sequences, the first padded on the left."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, TOKENS))
    mask = np.ones_like(tokens)
    mask[0, :PADDING] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def logits(model: onnx.ModelProto, folder: Path) -> np.ndarray:
    """Return what a model without a cache answers."""
    session = open_session(model, folder)
    found = session.run(None, questions(session.get_outputs()[0].shape[-1]))
    return np.asarray(found[0])


def examine(folder: Path, configuration: Configuration, given: np.ndarray) -> Row:
    """Make a configuration, and run it with its cache and without."""
    path = folder / "model.onnx"
    alone = run(path, configuration.passes) if configuration.passes else onnx.load(path, load_external_data=False)
    reference = logits(alone, folder)
    session = open_session(run(path, (*configuration.passes, Inject())), folder)
    contract = read_contract(session, alone)
    inputs = questions(reference.shape[-1])
    real = inputs["attention_mask"].astype(bool)
    case = Case(index=0, inputs=inputs, reference=reference, real=real, total=TOKENS)
    scores = score_case(session, contract, case)
    sizes = [(int(dims[1]), int(dims[3]) * dtype.itemsize) for dims, dtype in contract.pasts.values()]
    wrong = "; ".join(f"{bad.chunking}: {bad.error:.1e}" for bad in failures(scores, EXACT))
    heads = sum(heads for heads, _ in sizes) // 2
    if heads != configuration.total:
        wrong = f"expected {configuration.total} heads, found {heads}"
    return Row(
        model=folder.name,
        name=configuration.name,
        expected=configuration.total,
        heads=heads,
        bytes_per_token=sum(heads * size for heads, size in sizes),
        error=max(score.error for score in scores),
        changed=float(np.abs(reference - given)[real].max() / np.ptp(given[real])),
        wrong=wrong,
    )


def compare_methods(folder: Path) -> None:
    """Print what each configuration loses by means, and by components and least squares, on random tokens."""
    print(f"{'model':14} {'configuration':14} {'heads':>5} {'parameters':>12} {'KL mean':>9} {'KL fitted':>9}")
    for configuration in CONFIGURATIONS:
        (count, mean), (_, fitted) = (
            loss(folder, passes) for passes in (configuration.passes, configuration.derived("pca", "least-squares"))
        )
        print(
            f"{folder.name:14} {configuration.name:14} {configuration.total:5} {count:12,} {mean:9.3f} {fitted:9.3f}",
            flush=True,
        )


def loss(folder: Path, passes: Sequence[Pass]) -> tuple[int, float]:
    """Return the number of parameters after these passes, and the KL divergence in nats per token."""
    path, subject = folder / "model.onnx", Subject.of(folder)
    with tempfile.TemporaryDirectory() as made:
        subject.text = Path(made) / "text.ids"
        vocabulary = int(subject.model.graph.outputs[0].shape[-1])
        subject.text.write_text(" ".join(map(str, np.random.default_rng(1).integers(0, vocabulary, LOSS_TOKENS))))
        model = Pipeline(passes).run(subject).model
        with io.staged(model, None, folder) as candidate:
            found = measure_loss(path, candidate, text=subject.text, held_out=True, folder=folder)
    weights = (value.const_value for value in model.graph.initializers.values())
    return sum(one.size for one in weights if one is not None and one.dtype.is_floating_point()), found.kl_divergence


def main() -> int:
    """Print a table; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--loss", action="store_true", help="compare methods instead")
    options = parser.parse_args()
    if options.loss:
        for folder in options.folders:
            compare_methods(folder)
        return 0
    rows: list[Row] = []
    print(
        f"{'model':14} {'configuration':14} {'heads':>5} {'bytes/token':>11} {'of MHA':>7} {'error':>8} {'changed':>8}"
    )
    for folder in options.folders:
        given = logits(onnx.load(folder / "model.onnx", load_external_data=False), folder)
        whole = 0
        for configuration in CONFIGURATIONS:
            row = examine(folder, configuration, given)
            rows.append(row)
            whole = whole or row.bytes_per_token
            part = row.bytes_per_token / whole
            if part * HEADS * LAYERS != row.heads:
                row = rows[-1] = dataclasses.replace(row, wrong=row.wrong or "the cache is not in proportion")
            print(
                f"{row.model:14} {row.name:14} {row.heads:5} {row.bytes_per_token:11,} {part:7.4f} {row.error:8.1e} "
                f"{row.changed:8.1e} {row.wrong}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1), encoding="utf-8")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
