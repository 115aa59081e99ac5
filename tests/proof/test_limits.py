"""Models that are correct up to a length: the injected model ends with an error beyond it, not with a wrong result."""

import numpy as np
import onnx
import pytest
from attentions import attention, in_order, switched_beyond
from laws import assert_law, in_chunks, in_onnxruntime, texts
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from written import read

from kvsurgeon import io
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.proof.length_sweep import BATCHES, LengthSweep

SWITCH = 100
SWITCHED = switched_beyond(SWITCH)
TABLE = attention(constants="float[100, 8] table", hidden="p = Slice(table, first, n1, first)\n h = Add(x, p)").replace(
    "length = Gather(sizes, one)", "length = Gather(sizes, one)\n n1 = Unsqueeze(length, first)"
)
INSIDE = attention(
    constants=f"int64 switch = {{{SWITCH}}}, float unit = {{1.0}}",
    scores="beyond = Greater(length, switch)\n f = Where(beyond, half, unit)\n s = Mul(s0, f)",
)
GATHERED = attention(constants="float[100, 8] table", hidden="p = Gather(table, at)\n h = Add(x, p)")


def injected(original: onnx.ModelProto) -> tuple[onnx.ModelProto, Changed]:
    subject = Subject.of(original)
    outcome = Inject().apply(subject)
    return io.to_proto(subject.model), outcome


@pytest.mark.parametrize(
    "text",
    [SWITCHED, INSIDE, TABLE, GATHERED],
    ids=["a switch", "a switch inside attention", "a sliced table", "a gathered table"],
)
def test_correct_up_to_the_limit_and_an_error_beyond(text):
    original = read(text)
    result, _ = injected(original)
    assert_law(original, result, texts(original, 1, SWITCH), (90, 98, 99))

    run = in_onnxruntime(result)
    with pytest.raises((InvalidArgument, Fail)):
        in_chunks(result, run, texts(original, 1, SWITCH + 1), (90, 98, 99, 100))
    with pytest.raises((InvalidArgument, Fail)):
        in_chunks(result, run, texts(original, 1, SWITCH + 1), ())


def test_onnxruntime_names_the_limit():
    original = read(SWITCHED)
    result, _ = injected(original)
    with pytest.raises(InvalidArgument, match=f"Name:'total_length_exceeds_the_maximum_of_{SWITCH}_tokens'"):
        in_chunks(result, in_onnxruntime(result), texts(original, 1, SWITCH + 1), (90, 98, 99, 100))


def test_notes_and_facts_contain_the_limit():
    original = read(SWITCHED)
    _, outcome = injected(original)
    (note,) = outcome.notes
    assert f"beyond {SWITCH} tokens" in note
    assert Subject.of(original).decoder().max_length == SWITCH


@pytest.mark.parametrize("text", [TABLE, GATHERED], ids=["sliced", "gathered"])
def test_rows_of_a_table_limit_the_length(text):
    assert Subject.of(read(text)).decoder().max_length == SWITCH


def test_an_offset_into_a_table_lowers_the_limit():
    text = GATHERED.replace("p = Gather(table, at)", "offset = Add(at, half2)\n p = Gather(table, offset)")
    text = text.replace("float[100, 8] table", "float[100, 8] table, int64 half2 = {2}")
    assert Subject.of(read(text)).decoder().max_length == SWITCH - 2


def test_no_guard_without_a_limit():
    original = read(attention())
    result, outcome = injected(original)
    assert outcome.notes == ()
    assert Subject.of(original).decoder().max_length is None
    assert not [node.name for node in result.graph.node if "exceeds_the_maximum" in node.name]


@pytest.mark.parametrize("position", [3000, 20_000])
def test_positions_in_a_list_that_are_out_of_order_limit_the_length(position):
    text = attention(
        allowed="n1 = Unsqueeze(length, first)\n places = Slice(table, first, n1, first)\n"
        " keys = Unsqueeze(places, first)\n queries = Unsqueeze(places, second)\n allowed = LessOrEqual(keys, queries)"
    )
    original = in_order(read(text))
    places = np.arange(40_000)
    places[position] -= 5
    original.graph.initializer.append(onnx.numpy_helper.from_array(places, "table"))
    _, outcome = injected(original)
    assert position - 20 <= outcome.proof.limit <= position


def test_a_list_that_differs_at_two_short_lengths_is_rejected():
    hidden = (
        "part0 = Mul(at, nought)\n fours = Add(part0, four)\n part = Div(fours, length)\n rest = Mod(part, length)\n"
        " f = Cast<to = 1>(rest)\n f1 = Unsqueeze(f, second)\n h = Add(x, f1)"
    )  # adds 1 at 3 and 4 tokens, and 0 at others
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        injected(read(attention(hidden=hidden, constants="int64 four = {4}")))


@pytest.mark.parametrize("runs_up_to", [2, 5, 6])
def test_a_limit_may_be_the_number_of_sequences_that_are_run(runs_up_to):
    """Context that has a size of the batch in place of the length runs at few tokens only, whatever its length."""
    sweep = LengthSweep(Subject.of(read(attention())).analysis())

    def run(length: int) -> list[np.ndarray]:
        if length > runs_up_to:
            raise UnsupportedError("cannot run the context", code=Code.CONTEXT_NOT_RUNNABLE)
        return []

    if runs_up_to <= max(BATCHES):
        with pytest.raises(UnsupportedError, match="cannot run the context"):
            sweep.run((1, 2, 7), run)
    else:
        assert list(sweep.run((1, 2, 7), run)) == [1, 2]
        assert sweep.bounds == {runs_up_to}
