"""Cached tensors of several layers, or keys and values, may share one input and one output."""

from __future__ import annotations

import numpy as np
import pytest
from laws import difference, in_onnxruntime
from onnx import numpy_helper
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

# two layers: each attends to x with keys k and values v, and x becomes the result
LAYER = """  qI = MatMul(xI, wq)
  kI = MatMul(xI, wk)
  vI = MatMul(xI, wv)
  all_kI = Concat<axis = 1>(past_kI, kI)
  all_vI = Concat<axis = 1>(past_vI, vI)
  ktI = Transpose<perm = [0, 2, 1]>(all_kI)
  productsI = MatMul(qI, ktI)
  sI = Mul(productsI, scale)
  maskedI = Where(allowed, sI, low)
  wI = Softmax<axis = -1>(maskedI)
  oI = MatMul(wI, all_vI)
"""
DECODER = """case (float[b, n, 8] x0, INPUTS) => (float[b, n, 8] o1, OUTPUTS)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, int64 nought = {0}, int64 one = {1}, int64 two = {2},
 int64[1] first = {0}, int64[1] second = {1}, float low = {-10000.0}, float scale = {0.05}>
{
SLICES
  before = Shape(COUNTED)
  past = Gather(before, AXIS)
  sizes = Shape(x0)
  new = Gather(sizes, one)
  total = Add(past, new)
  columns = Range(nought, total, one)
  rows = Range(past, total, one)
  column = Unsqueeze(columns, first)
  row = Unsqueeze(rows, second)
  allowed = LessOrEqual(column, row)
LAYERS
STACKED
}"""
LAYERS = LAYER.replace("I", "0") + "  x1 = Add(x0, o0)\n" + LAYER.replace("I", "1")


def decoder(inputs: str, outputs: str, slices: str, stacked: str, counted: str, axis: str):
    text = DECODER.replace("INPUTS", inputs).replace("OUTPUTS", outputs).replace("SLICES", slices)
    text = text.replace("STACKED", stacked).replace("COUNTED", counted).replace("AXIS", axis)
    return read(text.replace("LAYERS", LAYERS))


SEPARATE = decoder(
    ", ".join(f"float[b, p, 8] past_{one}" for one in ("k0", "v0", "k1", "v1")),
    ", ".join(f"float[b, t, 8] all_{one}" for one in ("k0", "v0", "k1", "v1")), "", "", "past_k0", "one",
)  # fmt: skip
OF_LAYERS = decoder(
    "float[2, b, p, 8] keys, float[2, b, p, 8] values", "float[2, b, t, 8] new_keys, float[2, b, t, 8] new_values",
    """  past_k0 = Gather(keys, nought)
  past_k1 = Gather(keys, one)
  halves_0, halves_1 = Split<num_outputs = 2>(values)
  past_v0 = Squeeze(halves_0, first)
  past_v1 = Squeeze(halves_1, first)""",
    """  up_k0 = Unsqueeze(all_k0, first)
  up_k1 = Unsqueeze(all_k1, first)
  new_keys = Concat<axis = 0>(up_k0, up_k1)
  up_v0 = Unsqueeze(all_v0, first)
  up_v1 = Unsqueeze(all_v1, first)
  new_values = Concat<axis = 0>(up_v0, up_v1)""",
    "keys", "two",
)  # fmt: skip
OF_ALL = decoder(
    "float[2, 2, b, p, 8] kv", "float[2, 2, b, t, 8] new_kv",
    """  layer_0 = Gather(kv, nought)
  layer_1 = Gather(kv, one)
  past_k0 = Gather(layer_0, nought)
  past_v0 = Gather(layer_0, one)
  past_k1 = Gather(layer_1, nought)
  past_v1 = Gather(layer_1, one)""",
    """  up_k0 = Unsqueeze(all_k0, first)
  up_v0 = Unsqueeze(all_v0, first)
  kv_0 = Concat<axis = 0>(up_k0, up_v0)
  up_k1 = Unsqueeze(all_k1, first)
  up_v1 = Unsqueeze(all_v1, first)
  kv_1 = Concat<axis = 0>(up_k1, up_v1)
  up_0 = Unsqueeze(kv_0, first)
  up_1 = Unsqueeze(kv_1, first)
  new_kv = Concat<axis = 0>(up_0, up_1)""",
    "past_k0", "one",
)  # fmt: skip
IN_FEATURES = decoder(
    "float[b, p, 32] kv", "float[b, t, 32] new_kv",
    "  past_k0, past_v0, past_k1, past_v1 = Split<axis = 2, num_outputs = 4>(kv)",
    "  new_kv = Concat<axis = 2>(all_k0, all_v0, all_k1, all_v1)", "kv", "one",
)  # fmt: skip
FORMS = {"of layers": OF_LAYERS, "of layers, keys and values": OF_ALL, "in the features": IN_FEATURES}


@pytest.mark.parametrize("form", FORMS)
def test_a_stacked_cache_is_removed(form):
    found = []
    for model in (SEPARATE, FORMS[form]):
        subject = Subject.of(model)
        assert isinstance(RemoveCache().apply(subject), Changed)
        result = io.to_proto(subject.model)
        assert [value.name for value in result.graph.input] == ["x0"]
        x = np.random.default_rng(0).standard_normal((2, 7, 8)).astype(np.float32)
        found.append(in_onnxruntime(result)({"x0": x})["o1"])
    assert difference(*found) <= 1e-6


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["of layers", "in the features"])
def test_a_stacked_cache_becomes_separate_tensors(form, cache):
    done = run_and_save(FORMS[form], Pipeline((Retarget(cache=cache),)), effort="quick", seed=0)
    assert done.verification.verdict == "same"
    assert len([value for value in done.model.graph.inputs if value.name.startswith("past_key_values")]) == 4


@pytest.mark.parametrize("form", FORMS)
def test_a_stacked_cache_is_named_and_not_restored(form):
    with pytest.raises(UnsupportedError, match="already has a cache"):
        Inject().apply(Subject.of(FORMS[form]))
    with pytest.raises(UnsupportedError, match="cannot be restored"):
        detach_cache(Subject.of(FORMS[form]))


def test_a_stack_in_another_order_is_refused_by_name():
    swapped = OF_LAYERS.__class__.FromString(OF_LAYERS.SerializeToString())
    node = next(node for node in swapped.graph.node if node.output[0] == "new_keys")
    node.input[:] = reversed(node.input)
    for one in (RemoveCache(), Inject()):
        with pytest.raises(UnsupportedError, match=r"cache.* - at `keys`"):
            one.apply(Subject.of(swapped))


def test_a_cache_that_drops_its_oldest_row_is_refused_by_name():
    model = decoder(
        ", ".join(f"float[b, 5, 8] past_{one}" for one in ("k0", "v0", "k1", "v1")),
        ", ".join(f"float[b, 5, 8] kept_{one}" for one in ("k0", "v0", "k1", "v1")),
        "", "\n".join(f"  kept_{one} = Slice(all_{one}, minus, far, second)" for one in ("k0", "v0", "k1", "v1")),
        "past_k0", "one",
    )  # fmt: skip
    bounds = {"minus": -5, "far": 2**31}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([one]), name) for name, one in bounds.items())
    with pytest.raises(UnsupportedError, match=r"updated in an unknown way.*Concat.*Slice.* - at `past_k0`"):
        RemoveCache().apply(Subject.of(model))
