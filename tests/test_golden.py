"""Each case of `golden/inject.txt`: its text after the pass, what the checker says of it, and what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import pytest
from laws import CUTS, assert_law, in_onnxruntime, in_reference, texts
from written import read, write

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject

GOLDEN = Path(__file__).parent / "golden" / "inject.txt"
AFTER = "--- after\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    title: str
    head: dict[str, str]  # what the lines `# word: ...` say
    before: str
    after: str

    @cached_property
    def original(self) -> onnx.ModelProto:
        return read(self.before, int(self.head.get("opset", 18)))

    @cached_property
    def injected(self) -> onnx.ModelProto:
        subject = Subject.of(self.original)
        assert isinstance(Inject().apply(subject), Changed)
        return io.to_proto(subject.model)

    def text(self) -> str:
        lines = [f"# {word}: {value}\n" for word, value in {"title": self.title, **self.head}.items()]
        after = f"{AFTER}{self.after}" if self.after else ""
        return "".join([*lines, self.before, after])


def cases() -> tuple[str, list[Case]]:
    """Return what the file says before its first case, and its cases."""
    preface, *parts = GOLDEN.read_text("utf-8").split("# title: ")
    found = []
    for part in parts:
        title, rest = part.split("\n", 1)
        head = {}
        while rest.startswith("# "):
            line, rest = rest.split("\n", 1)
            word, _, value = line[2:].partition(": ")
            head[word] = value
        before, _, after = rest.rstrip().partition(AFTER)
        found.append(Case(title=title, head=head, before=before.rstrip() + "\n", after=after and after + "\n"))
    return preface, found


PREFACE, CASES = cases()
MISSES = [case for case in CASES if "miss" in case.head]
HITS = [case for case in CASES if "miss" not in case.head]


def titles(case: Case) -> str:
    return case.title


def test_what_must_be_refused_comes_first():
    assert CASES[: len(MISSES)] == MISSES
    assert len({case.title for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", MISSES, ids=titles)
def test_refused(case):
    subject = Subject.of(case.original)
    before = write(io.to_proto(subject.model))

    with pytest.raises(UnsupportedError) as refusal:
        Inject().apply(subject)

    assert case.head["miss"] in str(refusal.value)
    assert refusal.value.at or "no attention" in refusal.value.reason
    assert write(io.to_proto(subject.model)) == before, "a refused model is as it was"


def test_texts_are_as_written(request):
    if request.config.getoption("--update-goldens"):
        written = [Case(title=c.title, head=c.head, before=c.before, after=write(c.injected)) for c in HITS]
        GOLDEN.write_text(PREFACE + "\n".join(case.text() for case in [*MISSES, *written]), "utf-8")
        pytest.skip("goldens written; read the difference")
    assert {case.title: write(case.injected) for case in HITS} == {case.title: case.after for case in HITS}


@pytest.mark.parametrize("case", HITS, ids=titles)
def test_the_text_describes_a_valid_model(case):
    onnx.checker.check_model(case.injected, full_check=True)


@pytest.mark.parametrize("start", [in_onnxruntime, in_reference], ids=["onnxruntime", "reference"])
@pytest.mark.parametrize("case", HITS, ids=titles)
def test_it_computes_the_same(case, start):
    original = case.original
    fixed, whole = "fixed" in case.title, texts(original, batch=2)
    if fixed:
        whole = {name: array[:1, :6] for name, array in whole.items()}
    assert_law(original, case.injected, whole, (3, 4) if fixed else CUTS, start=start)


@pytest.mark.parametrize("case", HITS, ids=titles)
def test_a_second_injection_is_refused(case):
    with pytest.raises(UnsupportedError, match="already has a cache"):
        Inject().apply(Subject.of(case.injected))
