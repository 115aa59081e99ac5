"""At a decode step nothing costs the square of the context, and tables of positions cost one row."""

import numpy as np
import onnx
import pytest
from exports import NAMES, injected, injected_export, with_all_outputs
from laws import assert_law, difference, in_onnxruntime
from written import read

from kvsurgeon.errors import RunError
from kvsurgeon.runtime import CachedDecoder, open_session

SHORT, LONG = 25, 50  # past tokens


def sizes_of_a_step(model: onnx.ModelProto, past: int) -> dict[str, int]:
    """Elements of every value that one decode step makes after so many tokens."""
    feeds = {"input_ids": np.ones((1, 1), np.int64), "attention_mask": np.ones((1, past + 1), np.int64)}
    feeds = {value.name: feeds[value.name] for value in model.graph.input if value.name in feeds}
    for value in model.graph.input:
        if value.name not in feeds:
            heads, _, width = (size.dim_value for size in value.type.tensor_type.shape.dim[1:])
            feeds[value.name] = np.ones((1, heads, past, width), np.float32)
    return {name: array.size for name, array in in_onnxruntime(with_all_outputs(model))(feeds).items()}


def squares(short: dict[str, int], long: dict[str, int]) -> list[str]:
    """Values that grow with the square of the context."""
    return [value for value in short if long[value] * (SHORT + 1) > short[value] * (LONG + 1) + LONG]


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_is_linear_in_the_context(name):
    model = injected_export(name)
    short, long = sizes_of_a_step(model, SHORT), sizes_of_a_step(model, LONG)
    assert not squares(short, long)

    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    grown = [value for value, maker in makers.items() if maker in ("Cos", "Sin") and long[value] != short[value]]
    assert not grown


MASKED = """
masked (int64[batch, length] input_ids) => (float[batch, length, 4] logits)
<float[9, 4] table, float[4, 4] wk, int64 nought = {0}, int64 one = {1}, int64[1] ones = {1}, int64[1] two = {2},
 int64[1] first = {0}, float masked = {-10000.0}>
{
  x = Gather(table, input_ids)
  k = MatMul(x, wk)
  kt = Transpose<perm = [0, 2, 1]>(k)
  sizes = Shape(input_ids)
  n1 = Slice(sizes, ones, two)
  n = Squeeze(n1)
  square = Concat<axis = 0>(n1, n1)
  MASK
  s = MatMul(x, kt)
  shown = Where(visible, s, masked)
  w = Softmax<axis = -1>(shown)
  logits = MatMul(w, x)
}
"""
NUMBERS = """
  numbers = Reshape(flat, square)
  column = Mod(numbers, n)
  row = Div(numbers, n)
  visible = LessOrEqual(column, row)
"""
MASKS = {
    "Tile": """
  at = Range(nought, n, one)
  column = Unsqueeze(at, first)
  times = Concat<axis = 0>(n1, ones)
  columns = Tile(column, times)
  row = Unsqueeze(at, ones)
  visible = LessOrEqual(columns, row)
""",
    "numbers of all elements": "elements = Mul(n, n) flat = Range(nought, elements, one)" + NUMBERS,
    "ones that are summed": "elements = Mul(n1, n1) flat_ones = Expand(one, elements) "
    "flat = CumSum<exclusive = 1>(flat_ones, nought)" + NUMBERS,
    "ones that are summed, from 1": """
  flat_ones = ConstantOfShape<value = int64[1] {1}>(n1)
  at = CumSum(flat_ones, nought)
  column = Unsqueeze(at, first)
  row = Unsqueeze(at, ones)
  visible = LessOrEqual(column, row)
""",
}
COLUMNS_NEW = "elements = Mul(n, n) flat = Range(nought, elements, one)" + NUMBERS.replace(
    "Reshape(flat, square)", "Reshape(flat, square) numbers_t = Transpose(numbers)"
).replace("(numbers,", "(numbers_t,").replace("LessOrEqual(column, row)", "LessOrEqual(row, column)")


def masked(mask: str) -> onnx.ModelProto:
    """A decoder with a mask."""
    return read("\n".join(MASKED.replace("MASK", mask).replace(") ", ")\n").splitlines()))


@pytest.mark.parametrize("name", MASKS)
def test_only_rows_of_new_tokens_are_computed_of_a_mask(name):
    original = masked(MASKS[name])
    model = injected(original)
    assert_law(original, model)
    assert not squares(sizes_of_a_step(model, SHORT), sizes_of_a_step(model, LONG))


def test_columns_of_new_tokens_in_a_table_of_all_are_correct():
    original = masked(COLUMNS_NEW)
    assert_law(original, injected(original))


LAST = "from_end = Neg(n1) rows = Slice(tri, from_end, far, first) visible = Slice(rows, from_end, far, ones)"


def sliced_from_the_end(size: int) -> onnx.ModelProto:
    """A decoder whose mask is the end of a table of so many tokens."""
    model = masked(LAST)
    constants = {"tri": np.tri(size, dtype=bool), "far": np.array([np.iinfo(np.int64).max])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def test_only_rows_of_new_tokens_are_computed_of_the_end_of_a_table():
    original = sliced_from_the_end(64)
    model = injected(original)
    assert_law(original, model)
    assert not squares(sizes_of_a_step(model, SHORT), sizes_of_a_step(model, LONG))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_end_of_a_table_serves_as_many_tokens_as_it_has_rows(cache):
    original = sliced_from_the_end(12)
    decoder = CachedDecoder(open_session(injected(original, cache=cache), threads=1))
    tokens = np.arange(13)[None] % 9
    feeds = decoder.inputs.feeds(tokens, np.ones_like(tokens))
    expected = in_onnxruntime(original)({"input_ids": tokens[:, :12]})["logits"]
    found = [decoder.step(decoder.inputs.part(feeds, past, past + 1)) for past in range(12)]
    assert difference(np.concatenate(found, axis=1), expected) < 1e-5
    with pytest.raises(RunError):
        decoder.step(decoder.inputs.part(feeds, 12, 13))
