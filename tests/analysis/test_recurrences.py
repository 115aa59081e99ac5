"""Linear recurrences over chunks of tokens: a state of fixed size is passed from call to call."""

import itertools

import numpy as np
import pytest
from attentions import shuffled
from exports import injected
from laws import ALLOWED, assert_law, difference, dims_of, in_onnxruntime, texts
from onnx import numpy_helper
from recurrences import hybrid, keyed_hybrid, keyed_scan, scan
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache, reattach_cache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import LENGTH
from kvsurgeon.workflow import verification

LOOK_ALIKES = {
    "a start that is not zero": {"START": "unit"},
    "padding that counts as tokens": {"LOG_PAD": "unit"},
    "states of later chunks": {"ORDER": "GreaterOrEqual"},
    "states of all chunks": {"ORDER": "NotEqual"},
    "the state after the chunk": {"PREVIOUS": "second, far"},
    "a maximum over the text": {"y1 = NORM(y0)": "highest = ReduceMax(y0)\n y1 = Div(y0, highest)"},
    "tokens of the chunk that follow": {" earlier = LessOrEqual": " earlier = GreaterOrEqual"},
    "a state that is bounded": {
        "previous1 = Unsqueeze(previous,": "bounded = Tanh(previous)\n previous1 = Unsqueeze(bounded,"
    },
    "a decay for each chunk": {
        "totals = Reshape": "totals0 = Reshape",
        " later =": " totals = Add(totals0, tenth)\n later =",
    },
    "other tokens within chunks than across them": {
        "la = MatMul": "z = MatMul(x, wz)\n zp = Pad(z, pads, nil)\n zc = Reshape(zp, chunks)\n la = MatMul",
        "MatMul(weights, xc)": "MatMul(weights, zc)",
    },
    "another reader of the states": {
        " previous1 =": " read = ReduceMax(between)\n previous1 =",
        "NORM(y0)": "Mul(y0, read)",
    },
}


def test_a_recurrence_over_chunks_has_a_state_of_fixed_size():
    original = read(hybrid(scan()))
    model = injected(original)
    states = {value.name: dims_of(value) for value in model.graph.input if "state" in value.name}
    assert states == {"past_key_values.0.recurrent_state": ["batch_size", 8]}
    for length, cuts in ((3, [1, 2]), (12, [4, 8]), (13, range(1, 13)), (13, [5, 6, 11]), (9, [3])):
        assert_law(original, model, whole=texts(original, length=length), cuts=list(cuts))
    assert verification.verify_models(original, model).verdict == "same"


@pytest.mark.parametrize("seed", range(6))
def test_it_is_found_in_any_order_of_the_nodes(seed):
    rows = "token_at = Range(nought, length, one)\n four_of = Mod(token_at, four)\n rows = Gather(wz, four_of)"
    keys = {"kb0 = MatMul(x,": f"{rows}\n xr = Add(x, rows)\n kb0 = MatMul(xr,"}  # read context that others do not
    original = read(keyed_hybrid(keyed_scan(**keys)))
    states = [value.name for value in injected(shuffled(original, seed)).graph.input if "state" in value.name]
    assert states == ["past_key_values.0.recurrent_state"]


@pytest.mark.parametrize("changes", LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_regions_that_are_no_recurrence_are_rejected(changes):
    with pytest.raises(UnsupportedError, match=r"mixes tokens along the sequence|as those that fill up a chunk"):
        injected(read(hybrid(scan(**changes))))


@pytest.mark.parametrize("condition", ["Equal(length, prime)", "Greater(length, prime)", "Equal(double, twice_prime)"])
def test_a_factor_for_some_lengths_is_rejected(condition):
    switched = f"double = Add(length, length)\n is_one = {condition}\n factor = Where(is_one, half, unit)\n r0 = Mod"
    text = keyed_hybrid(keyed_scan(added="Mul(y2, factor)", **{"r0 = Mod": switched}))
    injected(read(text.replace("Where(is_one, half, unit)", "Where(is_one, half, half)")))
    with pytest.raises(UnsupportedError, match="as those that fill up a chunk"):
        injected(read(text))


def test_a_model_of_recurrences_alone_has_a_state():
    text = hybrid(scan()).split("  q0 = ")[0] + " logits = Identity(h)\n}"
    original = read(text)
    model = injected(original)
    assert [value.name for value in model.graph.input] == ["x", "past_key_values.0.recurrent_state"]
    assert_law(original, model, whole=texts(original, length=11), cuts=[1, 2, 6])
    assert verification.verify_models(original, model, effort="quick").verdict == "same"
    with pytest.raises(UnsupportedError, match="has no rows"):
        injected(original, cache="static")


@pytest.mark.parametrize("cache", ["static", "new-tokens"])
def test_each_cache_mode_supports_recurrences(cache):
    original = read(hybrid(scan()))
    assert verification.verify_models(original, injected(original, cache=cache), effort="quick").verdict == "same"


def test_a_note_says_that_a_recurrence_is_measured():
    notes = Inject().apply(Subject.of(read(hybrid(scan())))).notes
    assert any("in two pieces what it gives in one (measured" in note for note in notes)


@pytest.mark.parametrize("cache", ["dynamic", "static", "new-tokens"])
def test_a_recurrent_state_can_be_removed_and_injected_again(cache):
    original = read(hybrid(scan()))
    subject = Subject.of(injected(original, cache=cache))
    assert isinstance(RemoveCache().apply(subject), Changed)
    removed = io.to_proto(subject.model)
    assert [value.name for value in removed.graph.input] == [value.name for value in original.graph.input]
    feeds = texts(original, length=13)
    outputs = (in_onnxruntime(model)(feeds)["logits"] for model in (original, removed))
    assert difference(*outputs) <= ALLOWED["float32"]
    assert_law(original, injected(removed), whole=feeds, cuts=[4, 6])


@pytest.mark.parametrize(("before", "after"), [("dynamic", "static"), ("static", "dynamic")])
def test_a_cache_with_a_recurrent_state_can_be_changed(before, after):
    original = read(hybrid(scan()))
    subject = Subject.of(injected(original, cache=before))
    assert [one.kind for one in subject.cache()] == ["key", "value", "recurrent_state"]
    Retarget(cache=after).apply(subject)
    assert verification.verify_models(original, io.to_proto(subject.model), effort="quick").verdict == "same"


def test_a_recurrent_state_keeps_its_name_when_a_cache_is_restored():
    original = read(hybrid(scan()))
    subject = Subject.of(injected(original))
    RenameIo(names=("past_key_values.0.recurrent_state:before", "present.0.recurrent_state:after")).apply(subject)
    reattach_cache(subject, detach_cache(subject))
    restored = io.to_proto(subject.model)
    assert [value.name for value in restored.graph.input][-1] == "before"
    assert [value.name for value in restored.graph.output][-1] == "after"
    names = {"before": "past_key_values.0.recurrent_state", "after": "present.0.recurrent_state"}
    RenameIo(names=tuple(":".join(pair) for pair in names.items())).apply(subject)
    assert_law(original, io.to_proto(subject.model), whole=texts(original, length=9), cuts=[3, 4])


def test_a_state_that_no_output_returns_is_not_removed():
    model = injected(read(hybrid(scan())))
    model.graph.output.pop()
    with pytest.raises(UnsupportedError, match="no output returns the recurrent state"):
        RemoveCache().apply(Subject.of(model))


def test_sizes_of_whole_chunks_are_compared():
    sizes: list[dim.Dimension] = [1, 5, LENGTH, LENGTH + 1]
    for chunk in (3, 4):
        padded = dim.add(LENGTH, dim.remainder(dim.subtract(chunk, dim.remainder(LENGTH, chunk)), chunk))
        count = dim.floor_quotient(padded, chunk)
        sizes += [padded, count, dim.floor_quotient(LENGTH, chunk), dim.remainder(LENGTH, chunk), dim.add(count, 1)]
    for left, right in itertools.product(sizes, sizes):
        less, smaller = dim.is_less(left, right), dim.minimum(left, right)
        for length in (1, 2, 3, 4, 5, 11, 12, 13):
            numbers = [dim.at(size, length, 1) for size in (left, right, smaller)]
            assert numbers[2] == min(numbers[:2])
            assert less is None or less == (numbers[0] < numbers[1])
    assert dim.minimum(LENGTH, padded) == LENGTH


def test_a_state_of_the_chunk_before_is_found_to_be_wrong():
    original = read(hybrid(scan()))
    model = injected(original)
    gather = next(node for node in model.graph.node if node.output[0] == "present.0.recurrent_state")
    index = next(one for one in model.graph.initializer if one.name == gather.input[1])
    index.CopyFrom(numpy_helper.from_array(np.array(-2), index.name))
    assert verification.verify_models(original, model, effort="quick").verdict == "different"
