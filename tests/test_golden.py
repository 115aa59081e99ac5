"""Golden files: for each pass the smallest models that it rejects, leaves unchanged, and changes, as ONNX text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import pytest
from laws import CUTS, assert_law, difference, dims_of, in_onnxruntime, in_reference, texts
from written import read, write

from kvsurgeon import io
from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_metadata import KEY
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.registry import BUILT_IN

FOLDER = Path(__file__).parent / "golden"
AFTER = "--- after\n"
SIZES = {
    "batch_size": 2, "batch": 2, "b": 2, "sequence_length": 3, "length": 3, "n": 3, "past_sequence_length": 2,
    "total_sequence_length": 5, "max_length": 8, "cache_length": 5,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model of a golden file.

    Attributes:
        name: Name of the pass, and of the file.
        title: What the model shows.
        head: Lines `# key: value`: `options` of the pass, the `text` to calibrate it on, `opset` of the model, metadata
            of its `cache`, `metadata` of an input or output as `name key value`; `rejected` or `unchanged` with the
            reason; `run: no` with a reason if the interface changes, `again` with a reason if a second run adds nodes.
        before: The model as text.
        after: The result as text; empty if the model is rejected or unchanged.
    """

    name: str
    title: str
    head: dict[str, str]
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name}: {self.title}"

    @property
    def changes(self) -> bool:
        return not {"rejected", "unchanged"} & set(self.head)

    @cached_property
    def original(self) -> onnx.ModelProto:
        model = read(self.before, int(self.head.get("opset", 18)))
        if "cache" in self.head:
            model.metadata_props.add(key=KEY, value=self.head["cache"])
        name, key, number = self.head.get("metadata", "- - -").split()
        for value in (*model.graph.input, *model.graph.output):
            if value.name == name:
                value.metadata_props.add(key=key, value=number)
        return model

    @cached_property
    def result(self) -> onnx.ModelProto:
        outcome, model = self.run(self.original)
        assert isinstance(outcome, Changed)
        return model

    def run(self, model: onnx.ModelProto) -> tuple[Outcome, onnx.ModelProto]:
        """Apply the pass to a copy of a model."""
        options = f"{{{self.head['options']}}}" if "options" in self.head else ""
        (one,) = Pipeline.parse(f"{self.name}{options}").passes
        subject = Subject.of(onnx.ModelProto.FromString(model.SerializeToString()))
        subject.text = FOLDER / self.head["text"] if "text" in self.head else None
        outcome = one.apply(subject)
        return outcome, io.to_proto(subject.model)

    def text(self) -> str:
        head = "".join(f"# {key}: {value}\n" for key, value in {"title": self.title, **self.head}.items())
        return head + self.before + (f"{AFTER}{self.after}" if self.after else "")

    def updated(self) -> Case:
        """Return the case with the reason or the text that the pass gives now."""
        if self.changes:
            return replace(self, after=write(self.result))
        kind = "rejected" if "rejected" in self.head else "unchanged"
        return replace(self, head={**self.head, kind: reason_of(self)})


def reason_of(case: Case) -> str:
    """Return the reason for which a pass rejects a model or leaves it unchanged."""
    try:
        outcome, _ = case.run(case.original)
    except KvsurgeonError as error:
        return str(error)
    assert isinstance(outcome, Unchanged)
    return outcome.reason


def parsed(path: Path) -> tuple[str, list[Case]]:
    """Return the text before the first case of a golden file, and its cases."""
    preface, *parts = path.read_text("utf-8").split("# title: ")
    return preface, [_case(path.stem, *part.split("\n", 1)) for part in parts]


def _case(name: str, title: str, rest: str) -> Case:
    head = {}
    while rest.startswith("# "):
        line, rest = rest.split("\n", 1)
        key, _, value = line[2:].partition(": ")
        head[key] = value
    before, _, after = rest.rstrip().partition(AFTER)
    return Case(name=name, title=title, head=head, before=before.rstrip() + "\n", after=after and after + "\n")


FILES = {path.stem: parsed(path) for path in sorted(FOLDER.glob("*.txt"))}
CASES = [case for _, cases in FILES.values() for case in cases]
CHANGED = [case for case in CASES if case.changes]
INJECTED = [case for case in CHANGED if case.name == "inject"]
RUN = [case for case in CHANGED if case.name != "inject" and "run" not in case.head]


def every(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def test_every_pass_has_a_golden_file():
    assert set(FILES) == set(BUILT_IN) - {"uptrain"}  # trained weights depend on torch; tests/training shows them


@pytest.mark.parametrize("name", FILES)
def test_a_file_shows_look_alikes_first_then_changes(name):
    _, cases = FILES[name]
    order = [case.changes for case in cases]
    assert order == sorted(order)
    assert {True, False} == set(order)
    assert len({case.title for case in cases}) == len(cases)


@pytest.mark.parametrize("name", FILES)
def test_texts_are_as_written(name, request):
    preface, cases = FILES[name]
    updated = [case.updated() for case in cases]
    if request.config.getoption("--update-goldens"):
        (FOLDER / f"{name}.txt").write_text(preface + "\n".join(case.text() for case in updated), "utf-8")
        pytest.skip("golden file written; read the difference")
    assert [case.text() for case in updated] == [case.text() for case in cases]


@every([case for case in CASES if not case.changes])
def test_a_look_alike_stays_unchanged(case):
    subject = Subject.of(case.original)
    subject.text = FOLDER / case.head["text"] if "text" in case.head else None
    before = write(io.to_proto(subject.model))
    options = f"{{{case.head['options']}}}" if "options" in case.head else ""
    (one,) = Pipeline.parse(f"{case.name}{options}").passes
    try:
        outcome: Outcome | None = one.apply(subject)
    except KvsurgeonError:
        outcome = None
    assert ("rejected" in case.head) == (outcome is None)
    assert write(io.to_proto(subject.model)) == before


@every(CHANGED)
def test_a_result_is_a_valid_model(case):
    if any(node.domain == "com.microsoft" for node in case.result.graph.node):
        in_onnxruntime(case.result)  # onnx knows no types of these operators
    else:
        onnx.checker.check_model(case.result, full_check=True)


@every([case for case in CHANGED if "again" not in case.head])
def test_a_second_run_adds_nothing(case):
    try:
        outcome, again = case.run(case.result)
    except KvsurgeonError:
        return
    operators, same = ([node.op_type for node in model.graph.node] for model in (case.result, again))
    assert isinstance(outcome, Unchanged) or sorted(operators) == sorted(same)


@pytest.mark.parametrize("start", [in_onnxruntime, in_reference], ids=["onnxruntime", "reference"])
@every([case for case in INJECTED if "options" not in case.head])
def test_an_injected_model_computes_the_same(case, start):
    original = case.original
    fixed, whole = "fixed" in case.title, texts(original, batch=2)
    if fixed:
        whole = {name: array[:1, :6] for name, array in whole.items()}
    assert_law(original, case.result, whole, (3, 4) if fixed else CUTS, start=start)


@every(RUN)
def test_a_result_computes_the_same(case):
    feeds = dict(_feeds(case.original))
    before, after = in_onnxruntime(case.original)(feeds), in_onnxruntime(case.result)
    found = after({value.name: _as_type(feeds[value.name], value) for value in case.result.graph.input})
    assert set(found) == set(before)
    for name, expected in before.items():
        if expected.dtype.kind == "f":
            assert difference(found[name], expected) < 1e-5, name
        else:
            np.testing.assert_array_equal(found[name], expected, name)


def _feeds(model: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    """Yield an array for each input: 1 in masks, positions after the past, small ids, random numbers elsewhere."""
    random = np.random.default_rng(0)
    for value in model.graph.input:
        shape = [SIZES.get(size, size) for size in dims_of(value)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if "mask" in value.name:
            yield value.name, np.ones(shape, dtype)
        elif value.name == "past_sequence_length":
            yield value.name, np.full(shape, SIZES["past_sequence_length"], dtype)
        elif dtype.kind in "iu":
            yield value.name, random.integers(0, 4, shape).astype(dtype)
        else:
            yield value.name, random.standard_normal(shape).astype(dtype)


def _as_type(array: np.ndarray, value: onnx.ValueInfoProto) -> np.ndarray:
    return array.astype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
