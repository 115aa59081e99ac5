"""A sample of the mutation campaign; and the campaign sees what it is there to see."""

from dataclasses import replace
from multiprocessing import Pipe

import broken_decoders as shelf
import mutations
import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import FILES, export
from laid_out import lay_out, stored
from mutating import mutant_run
from mutating.mutant_run import BAD, Outcome, try_file, try_mutant
from onnxruntime.quantization import quantize_dynamic
from verification.independent_verifier import open_session
from verification.uncached import answer, change, distance
from verification.unquantized import without_dynamic_ranges

from kvsurgeon.errors import UnsupportedError

SEED, MUTANTS = 2, 40
BLANK = Outcome(number=0, model="tiny", mutation="none")


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return [
        lay_out(folder / name, model := export(name), stored(model, batch=1, length=14), stored(model, length=12))
        for name in FILES
    ]


@pytest.mark.parametrize("number", range(MUTANTS))
def test_a_mutant_is_refused_or_right(entries, number):
    entry, outcome, mutant = mutations.make(entries, SEED, number)
    assert mutant is not None
    outcome = mutations.run_mutant(outcome, entry, mutant)
    assert outcome.category not in BAD, outcome


def test_a_number_of_a_seed_is_one_mutant(entries):
    (_, first, one), (_, second, other) = (mutations.make(entries, SEED, 7) for _ in range(2))
    assert (first, one) == (second, other)
    assert {mutations.make(entries, SEED, number)[1].mutation for number in range(200)} > {"damage", "bypass"}


# Wrong results are detected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = Decoder(Config()).model()
    return lay_out(tmp_path_factory.mktemp("tiny") / "model", model, stored(model, batch=1, length=14), stored(model))


def tried(tiny, monkeypatch, inject):
    monkeypatch.setattr(mutant_run, "_injected", inject)
    return try_mutant(BLANK, tiny, onnx.load(tiny.path))


def raising(error):
    def inject(_mutant, _folder):
        raise error

    return inject


def test_a_right_injection_is_right(tiny):
    assert try_mutant(BLANK, tiny, onnx.load(tiny.path)).category == "right"


@pytest.mark.parametrize("broken", [shelf.WrongCorner, shelf.StaleRotary, shelf.PastPaddingIgnored, Decoder])
def test_a_wrong_injection_is_wrong(tiny, monkeypatch, broken):
    assert tried(tiny, monkeypatch, lambda *_: (broken(Config()).model(), frozenset())).category == "wrong"


@pytest.fixture(scope="module")
def in_8_bits(tiny, tmp_path_factory):
    def quantized(model):
        folder = tmp_path_factory.mktemp("quantized")
        onnx.save(model, folder / "float.onnx")
        quantize_dynamic(folder / "float.onnx", folder / "made.onnx")
        return onnx.load(folder / "made.onnx")

    model = quantized(Decoder(Config()).model())
    return lay_out(tiny.folder.parent / "in_8_bits", model, stored(model, length=14)), quantized


@pytest.mark.parametrize("broken", [shelf.StaleRotary, shelf.PastPaddingIgnored])
def test_a_wrong_injection_with_ranges_of_a_call_is_wrong(in_8_bits, monkeypatch, broken):
    entry, quantized = in_8_bits
    injected = quantized(broken(Config()).model())
    assert tried(entry, monkeypatch, lambda *_: (injected, frozenset())).category == "wrong"


def test_without_ranges_of_a_call_no_token_depends_on_later_ones(in_8_bits):
    entry, _ = in_8_bits
    model = onnx.load(entry.path)
    exact = without_dynamic_ranges(model)
    case = entry.cases(model)[0]
    changes = []
    for one in (model, exact):
        session = open_session(one, entry.folder)
        changes.append(change(session, replace(case, reference=answer(session, case))))
    assert changes[0] > 1e-3
    assert changes[1] < 1e-5
    assert distance(answer(open_session(exact, entry.folder), case), case) < 0.1


def test_masks_that_a_mutation_turned_around_are_filled_as_the_stored_ones_and_prove_nothing(tiny, monkeypatch):
    model, note = Decoder(Config()).model(), frozenset(["`m` hides the tokens that it marks"])
    notes = iter([note, frozenset(), note, note])
    found = [tried(tiny, monkeypatch, lambda *_: (model, next(notes))).category for _ in range(2)]
    assert found[0] == "not runnable"
    assert found[1] != "not runnable"


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (UnsupportedError("why", at="x"), "refused"),
        (UnsupportedError("why\nand how"), "traceback"),
        (KeyError("x"), "traceback"),
    ],
    ids=["a refusal", "a refusal of two lines", "a slip"],
)
def test_what_is_raised_counts_as_what_it_is(tiny, monkeypatch, error, category):
    assert tried(tiny, monkeypatch, raising(error)).category == category


def test_a_mutant_that_only_an_optimiser_lets_run_is_not_runnable(tiny):
    mutant = onnx.load(tiny.path)
    mutant.graph.node[0].op_type = "OfNobody"
    assert try_mutant(BLANK, tiny, mutant).category == "not runnable"


def test_a_file_that_cannot_be_read_is_refused(tiny):
    data = tiny.path.read_bytes()
    assert try_file(BLANK, tiny, data).category == "right"
    assert try_file(BLANK, tiny, data[: len(data) // 2]).category == "refused"
    assert try_file(BLANK, tiny, np.random.default_rng(0).bytes(999)).category == "refused"


@pytest.mark.parametrize(
    ("ended", "promised", "category"),
    [(False, "hang", "hang"), (True, "hang", "died"), (True, "not runnable", "not runnable")],
)
def test_a_worker_that_says_nothing_more_hangs_or_has_died(monkeypatch, ended, promised, category):
    monkeypatch.setattr(mutations, "SECONDS_ALLOWED", 0.05)
    mine, theirs = Pipe(duplex=False)
    theirs.send((False, Outcome(number=3, model="tiny", mutation="none", category=promised)))
    if ended:
        theirs.close()
    (outcome,) = mutations._until_stuck(mine)
    assert (outcome.number, outcome.category) == (3, category)


def test_a_mutant_that_names_axes_of_two_sizes_alike_is_not_judged(tiny):
    """What it states of its inputs is not true of those that are stored."""
    mutant = onnx.load(tiny.path)
    for axis in mutant.graph.input[0].type.tensor_type.shape.dim:
        axis.dim_param = "batch"
    outcome = try_mutant(BLANK, tiny, mutant)
    assert outcome.category in ("not runnable", "refused")
    with pytest.raises(mutant_run.NotRunnableError, match="`batch` is the name of axes of two sizes"):
        mutant_run.answered(tiny, mutant)
