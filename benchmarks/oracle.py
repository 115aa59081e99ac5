"""Compare inferred shapes with the shapes that onnxruntime computes, before and after injection.

    python benchmarks/oracle.py FOLDER... [--group G] [--only NAME] [--sample 80] [--json OUT]

Every value of a model becomes an output of it. Each stored call is cut to two lengths; where batches differ between the
calls, so do the pairs of batch and length. Before injection every dimension that is inferred, in symbols of batch and
length, is compared with the computed size; afterwards every dimension that the injected model declares, in two
calls with a past of 0 and of some tokens. Ends with 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from coverage import quiet
from verification.corpus import Case, Entry, corpus_parser, find_entries, spread_sample
from verification.independent_verifier import BATCH, NEW, PAST, TOTAL, empty_sizes, open_session, part_of, read_contract
from verification.uncached import LEVELS, first_tokens

import kvsurgeon
from kvsurgeon import io
from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.dataflow.shape_inference import infer_shapes
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.symbolic import dimension as dim

LENGTHS = (5, 8)  # tokens of a call, for the first stored call and the second
FIRST = 3  # tokens of the first of two calls with a cache

Sizes = Mapping[str, int]  # of batch and lengths


@dataclass(kw_only=True)
class Comparison:
    """Number of inferred dimensions of one model that were compared."""

    model: str
    pairs: list[tuple[int, int]] = field(default_factory=list)  # batch and length
    values: int = 0
    dimensions: int = 0
    wrong: list[str] = field(default_factory=list)
    not_run: str = ""

    def check(self, when: str, name: str, claimed: Sequence[Any], shape: Sequence[int]) -> None:
        """Compare the sizes claimed of a value, those that are no numbers left out, with its shape."""
        self.values += 1
        self.dimensions += sum(isinstance(size, int) for size in claimed)
        differs = any(isinstance(size, int) and size != real for size, real in zip(claimed, shape, strict=False))
        if differs or len(claimed) != len(shape):
            self.wrong.append(f"{when}, `{name}`: claimed {list(map(str, claimed))}, found {list(shape)}")


def examine(entry: Entry) -> Comparison:
    """Compare the inferred dimensions of one model with its runs; a refused model or a failed run is recorded."""
    compared = Comparison(model=entry.label)
    try:
        subject = io.load(entry.path)
        cases = calls(entry.cases(onnx.load(entry.path, load_external_data=False)))
        compared.pairs = [(case.batch, case.total) for case in cases]
        before(compared, entry, io.to_proto(subject), cases)
        original = onnx.load(entry.path, load_external_data=False)
        injected = kvsurgeon.KeyValueCacheInjector(entry.folder, inplace=False).apply(original)
        after(compared, entry, original, injected, cases)
    except KvsurgeonError as error:
        compared.not_run = f"refused: {error}"
    except Exception as error:  # onnxruntime has no kernel for one of its operators, or nothing is stored to run it on
        compared.not_run = f"{type(error).__name__}: {error}"[:300]
    return compared


def calls(cases: Sequence[Case]) -> list[Case]:
    """Return the stored calls, cut short; as they are where the length is fixed."""
    chosen = [*cases[:2], *cases[: 2 - len(cases)]] if cases else []
    return [first_tokens(case, min(case.total, length)) for case, length in zip(chosen, LENGTHS, strict=False)]


def before(compared: Comparison, entry: Entry, model: onnx.ModelProto, cases: Sequence[Case]) -> None:
    """Hold every inferred dimension against what runs."""
    graph = ir.from_proto(model).graph
    given = read_inputs(graph)
    length = given.length
    shapes = infer_shapes(list(graph), given.dimensions, graph.opset_imports.get("", 1))
    claimed = {value.name: shapes[value].shape for node in graph for value in node.outputs if value.name}
    session = open_session(with_all_outputs(model), entry.folder, LEVELS[-1])
    names = [output.name for output in session.get_outputs()]
    for case in cases if not isinstance(length, int) else entry.cases(model)[:1]:
        found = session.run(names, {given.name: case.inputs[given.name] for given in session.get_inputs()})
        at = ((dim.BATCH, case.batch), (dim.LENGTH, case.total))
        for name, array in _arrays(names, found):
            shape = claimed.get(name)
            if shape is not None:
                compared.check("before", name, [dim.substitute(size, at) for size in shape], array.shape)


def after(
    compared: Comparison, entry: Entry, original: onnx.ModelProto, injected: onnx.ModelProto, cases: Sequence[Case]
) -> None:
    """Hold every dimension that the injected model declares against what runs, with a past and without."""
    contract = read_contract(open_session(injected, entry.folder), original)
    declared = {value.name: _dims(value) for value in (*injected.graph.value_info, *injected.graph.output)}
    session = open_session(with_all_outputs(injected), entry.folder, LEVELS[-1])
    names = [output.name for output in session.get_outputs()]
    for case in cases:
        cache = {
            name: np.zeros(empty_sizes(name, dims, case.batch), dtype) for name, (dims, dtype) in contract.pasts.items()
        }
        for past, total in ((0, FIRST), (FIRST, case.total)):
            feeds = {name: part_of(name, dims, case.inputs, past, total) for name, dims in contract.given.items()}
            found = dict(_arrays(names, session.run(names, {**feeds, **cache})))
            sizes = {BATCH: case.batch, PAST: past, NEW: total - past, TOTAL: total}
            for name, array in found.items():
                if (dims := declared.get(name)) is not None:
                    compared.check(
                        f"after, past {past}", name, [sizes.get(str(size), size) for size in dims], array.shape
                    )
            cache = dict(zip(contract.pasts, (found[name] for name in contract.presents), strict=True))


def with_all_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every value that a node makes as an output, behind its own."""
    wide = onnx.ModelProto.FromString(model.SerializeToString())
    shown = {value.name for value in wide.graph.output}
    for node in wide.graph.node:
        wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name and name not in shown)
    return wide


def _arrays(names: Sequence[str], found: Iterable[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Values that are tensors: sequences and optionals have no shape."""
    return ((name, array) for name, array in zip(names, found, strict=True) if isinstance(array, np.ndarray))


def _dims(value: onnx.ValueInfoProto) -> list[int | str] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim]


def parse() -> argparse.Namespace:
    parser = corpus_parser(__doc__, sample=80)
    return parser.parse_args()


def main() -> int:
    """Hold claims against what runs, print, and return the exit code."""
    options = parse()
    quiet()
    entries = find_entries(options.folders, groups=options.group, names=options.only)
    entries = [entry for entry in entries if entry.expected == "inject"]
    start = time.perf_counter()
    results = [examine(entry) for entry in spread_sample(entries, options.sample)]
    for compared in results:
        for what in compared.wrong:
            print(f"{compared.model}: {what}")
        if compared.not_run:
            print(f"{compared.model}: {compared.not_run}")
    run = [compared for compared in results if not compared.not_run]
    values, dimensions = sum(compared.values for compared in run), sum(compared.dimensions for compared in run)
    wrong = sum(len(compared.wrong) for compared in results)
    pairs = len({pair for compared in run for pair in compared.pairs})
    print(
        f"{len(run)} models, {pairs} pairs of batch and length: {values} values, {dimensions} dimensions, {wrong} wrong"
        f" ({len(results) - len(run)} not run), in {time.perf_counter() - start:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(compared) for compared in results], indent=1), encoding="utf-8")
    return 1 if wrong or not run else 0


if __name__ == "__main__":
    sys.exit(main())
