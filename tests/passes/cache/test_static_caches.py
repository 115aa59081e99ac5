"""A buffer is a cache in whichever way its rows are written, if they follow directly on those of the past."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from laws import dims_of, in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache, reattach_cache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

ROWS = 12
POSITIONS = "int64[n] places"
COUNT = "int64 start"
TABLE = ", ".join(map(str, range(ROWS)))

DECODER = f"""case (float[b, n, 8] x, GIVEN, float[b, {ROWS}, 8] keys, float[b, {ROWS}, 8] values)
=> (float[b, n, 8] logits, float[b, {ROWS}, 8] new_keys, float[b, {ROWS}, 8] new_values)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, int64 nought = {{0}}, int64 one = {{1}}, int64[1] first = {{0}},
 int64[1] second = {{1}}, int64[1] third = {{2}}, int64[1, {ROWS}] columns = {{{TABLE}}}, float low = {{-10000.0}},
 float scale = {{0.05}}>
{{
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  sizes = Shape(k)
  new = Gather(sizes, one)
  PLACES
  rows = Unsqueeze(places, second)
  allowed = LessOrEqual(columns, rows)
  kt = Transpose<perm = [0, 2, 1]>(new_keys)
  products = MatMul(q, kt)
  s = Mul(products, scale)
  masked = Where(allowed, s, low)
  w = Softmax<axis = -1>(masked)
  logits = MatMul(w, new_values)
}}"""

COUNTED = "range = Range(nought, new, one)\n  places = Add(range, start)"
FIRST = "start = Gather(given, nought)\n  range = Range(nought, new, one)\n  places = Add(start, range)"
ELEMENTS = """flat = Unsqueeze(places, second)
  index = Expand(flat, sizes)
  new_keys = ScatterElements<axis = 1>(keys, index, k)
  new_values = ScatterElements<axis = 1>(values, index, v)"""
SLICES = """index = Unsqueeze(places, second)
  keys_t = Transpose<perm = [1, 0, 2]>(keys)
  k_t = Transpose<perm = [1, 0, 2]>(k)
  new_keys_t = ScatterND(keys_t, index, k_t)
  new_keys = Transpose<perm = [1, 0, 2]>(new_keys_t)
  values_t = Transpose<perm = [1, 0, 2]>(values)
  v_t = Transpose<perm = [1, 0, 2]>(v)
  new_values_t = ScatterND(values_t, index, v_t)
  new_values = Transpose<perm = [1, 0, 2]>(new_values_t)"""
ROW_NUMBERS = """batch = Gather(sizes, nought)
  sequences = Range(nought, batch, one)
  sequence = Unsqueeze(sequences, second)
  pair = Slice(sizes, first, third)
  sequence_all = Expand(sequence, pair)
  places_all = Expand(places, pair)
  sequence_last = Unsqueeze(sequence_all, third)
  place_last = Unsqueeze(places_all, third)
  index = Concat<axis = 2>(sequence_last, place_last)
  new_keys = ScatterND(keys, index, k)
  new_values = ScatterND(values, index, v)"""
ROWS_OF_SEQUENCES = ROW_NUMBERS.replace(
    "places_all = Expand(places, pair)", "places = Gather(position_ids, nought)"
).replace("(places_all,", "(position_ids,")
TENSOR = """batch = Gather(sizes, first)
  index = Expand(start, batch)
  new_keys = TensorScatter<axis = 1>(keys, k, index)
  new_values = TensorScatter<axis = 1>(values, v, index)"""
PER_SEQUENCE = """new_keys = TensorScatter<axis = 1>(keys, k, starts)
  new_values = TensorScatter<axis = 1>(values, v, starts)
  start = Gather(starts, nought)"""


def decoder(given: str, places: str, opset: int = 18) -> onnx.ModelProto:
    text = DECODER.replace("GIVEN", given).replace("PLACES", places)
    return read(text, opset)


FORMS = {
    "elements at positions": decoder(POSITIONS, ELEMENTS),
    "slices at positions": decoder(POSITIONS, SLICES),
    "pairs of numbers at positions": decoder(POSITIONS, ROW_NUMBERS),
    "pairs of numbers at positions of each sequence": decoder("int64[b, n] position_ids", ROWS_OF_SEQUENCES),
    "elements from a count on": decoder(COUNT, f"{COUNTED}\n  {ELEMENTS}"),
    "slices from a count on": decoder("int64[1] start", f"{COUNTED}\n  {SLICES}"),
    "slices from the first position on": decoder("int64[n] given", f"{FIRST}\n  {SLICES}"),
    "tensor from a count on": decoder("int64[1] start", f"{COUNTED}\n  {TENSOR}", 24),
    "tensor from a count for each sequence": decoder("int64[b] starts", f"{PER_SEQUENCE}\n  {COUNTED}", 24),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_buffer_is_removed_however_its_rows_are_written(form):
    subject = Subject.of(FORMS[form])
    assert isinstance(RemoveCache().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert [value.name for value in result.graph.input] == ["x"]
    random = np.random.default_rng(0)
    x = random.standard_normal((2, ROWS, 8)).astype(np.float32)
    whole = in_onnxruntime(result)({"x": x})["logits"]
    pasts = {name: np.full((2, ROWS, 8), 7, np.float32) for name in ("keys", "values")}
    run, found = in_onnxruntime(FORMS[form]), []
    for start, stop in ((0, 5), (5, 6), (6, 9), (9, ROWS)):
        feeds = {"x": x[:, start:stop], **pasts} | given(FORMS[form], start, stop)
        results = run(feeds)
        found.append(results["logits"])
        pasts = {"keys": results["new_keys"], "values": results["new_values"]}
    assert np.abs(np.concatenate(found, axis=1) - whole).max() < 1e-5


def given(model: onnx.ModelProto, start: int, stop: int) -> dict[str, np.ndarray]:
    """Return the input that gives the number of past tokens, or the positions of the new ones."""
    name = model.graph.input[1].name
    dims = [dim.dim_param or dim.dim_value for dim in model.graph.input[1].type.tensor_type.shape.dim]
    values = {(): start, (1,): [start], ("b",): [start, start], ("n",): range(start, stop)}
    values["b", "n"] = [range(start, stop)] * 2
    return {name: np.array(values[tuple(dims)], np.int64)}


@pytest.mark.parametrize(
    ("form", "cache"),
    [
        *((form, "dynamic") for form in FORMS),
        ("slices at positions", "static"),
        ("slices from the first position on", "new-tokens"),
    ],
)
def test_a_buffer_becomes_any_other_cache(form, cache):
    done = run_and_save(FORMS[form], Pipeline((Retarget(cache=cache),)), effort="quick", seed=0)
    assert done.verification.verdict == "same"
    assert not {"places", "given", "position_ids"} & {value.name for value in done.model.graph.inputs}


FOUR_AXES = {
    f"float[b, {ROWS}, 8]": f"float[b, 1, {ROWS}, 8]",
    "kt = Transpose<perm = [0, 2, 1]>(new_keys)": "kt = Transpose<perm = [0, 1, 3, 2]>(new_keys)",
    "q = MatMul(x, wq)": "q3 = MatMul(x, wq)\n  q = Unsqueeze(q3, second)",
    "k = MatMul(x, wk)": "k3 = MatMul(x, wk)\n  k = Unsqueeze(k3, second)",
    "v = MatMul(x, wv)": "v3 = MatMul(x, wv)\n  v = Unsqueeze(v3, second)",
    "new = Gather(sizes, one)": "last = Add(one, one)\n  new = Gather(sizes, last)",
    "<axis = 1>": "<axis = 2>",
    "logits = MatMul(w, new_values)": "o = MatMul(w, new_values)\n  logits = Squeeze(o, second)",
}


@pytest.mark.parametrize("given", ["int64[n] given", "int64[1, n] given", "int32[n] given"])
def test_the_input_of_positions_is_restored(given):
    places = "places = Identity(given)" if "1" not in given else "places = Squeeze(given, first)"
    if "int32" in given:
        places = "places = Cast<to = 7>(given)"
    text = DECODER.replace("GIVEN", given).replace("PLACES", f"{places}\n  {ELEMENTS}")
    for old, new in FOUR_AXES.items():
        text = text.replace(old, new)
    model = read(text)
    subject = Subject.of(model)
    signature = detach_cache(subject)
    assert "given" not in {value.name for value in subject.model.graph.inputs}
    reattach_cache(subject, signature)
    result = io.to_proto(subject.model)
    restored = next(value for value in result.graph.input if value.name == "given")
    (x,) = (value for value in result.graph.input if value.name == "x")
    assert dims_of(restored) == dims_of(model.graph.input[1])[:-1] + dims_of(x)[1:2]
    assert restored.type.tensor_type.elem_type == model.graph.input[1].type.tensor_type.elem_type
    assert len(result.graph.input) == len(model.graph.input)


OTHER_ROWS = {
    "one row later": ("places_next = Add(places, one)", ELEMENTS.replace("Unsqueeze(places", "Unsqueeze(places_next")),
    "rows that wrap": ("wrapped = Mod(places, five)", ELEMENTS.replace("Unsqueeze(places", "Unsqueeze(wrapped")),
    "rows up to the fifth": ("clamped = Min(places, five)", ELEMENTS.replace("Unsqueeze(places", "Unsqueeze(clamped")),
    "rows that are added": ("", ELEMENTS.replace("axis = 1>", 'axis = 1, reduction = "add">')),
    "rows in reverse": ("back = Sub(five, places)", ELEMENTS.replace("Unsqueeze(places", "Unsqueeze(back")),
}


@pytest.mark.parametrize("case", OTHER_ROWS)
def test_a_buffer_with_other_rows_is_refused(case):
    first, update = OTHER_ROWS[case]
    text = DECODER.replace("GIVEN", POSITIONS).replace("PLACES", f"{first}\n  {update}")
    text = text.replace("int64 one", "int64 five = {5}, int64 one")
    with pytest.raises(UnsupportedError, match="may not be written directly after those of the past"):
        RemoveCache().apply(Subject.of(read(text)))


def test_a_circular_buffer_is_refused():
    model = decoder("int64[1] start", f"{COUNTED}\n  {TENSOR}".replace("axis = 1", 'axis = 1, mode = "circular"'), 24)
    with pytest.raises(UnsupportedError, match="circular buffer"):
        RemoveCache().apply(Subject.of(model))


BY_ARITHMETIC = """across = Unsqueeze(places, first)
  down = Transpose<perm = [1, 0]>(columns)
  is_place = Equal(down, across)
  there = Cast<to = 1>(is_place)
  written = ReduceSum<keepdims = 1>(there, second)
  kept = Sub(unit, written)
  kept_keys = Mul(keys, kept)
  put_keys = MatMul(there, k)
  new_keys = Add(kept_keys, put_keys)
  kept_values = Mul(values, kept)
  put_values = MatMul(there, v)
  new_values = Add(put_values, kept_values)"""


def test_rows_that_are_written_by_arithmetic_are_refused_by_name():
    text = DECODER.replace("GIVEN", COUNT).replace("PLACES", f"{COUNTED}\n  {BY_ARITHMETIC}")
    model = read(text.replace("float low", "float unit = {1.0}, float low"))
    for apply in (RemoveCache().apply, Inject().apply, Subject.cache):
        with pytest.raises(UnsupportedError, match=r"cache.* - at `keys`"):
            apply(Subject.of(model))


@pytest.mark.parametrize("rows", ["largest = ArgMax<axis = 2, keepdims = 0>(x)\n  places = Gather(largest, nought)"])
def test_rows_that_the_content_chooses_are_refused(rows):
    model = decoder(COUNT, f"{rows}\n  {SLICES}")
    with pytest.raises(UnsupportedError, match="an input that is no length determines which rows are written"):
        RemoveCache().apply(Subject.of(model))


@pytest.mark.parametrize(
    ("form", "operator", "given"),
    [("slices at positions", "ScatterND", "places"), ("tensor from a count on", "TensorScatter", "start")],
)
def test_the_form_of_a_cache_is_told(form, operator, given):
    cache = Subject.of(FORMS[form]).cache()
    assert {(one.cache_mode, one.operator, one.past_length) for one in cache} == {("static", operator, given)}
