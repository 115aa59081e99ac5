"""int32-inputs and int64-inputs change the type of integer inputs and cast them back in the graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import Config, Decoder
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.interface.integer_inputs import Int32Inputs, Int64Inputs

TEXT = """case ({dtype}[b, n] ids, float[9, 4] table) => (float[b, n, 4] y, {dtype}[b, n] same)
{{ y = Gather(table, ids) same = Identity(ids) }}"""


@pytest.mark.parametrize(
    ("apply", "old", "new"), [(Int32Inputs(), "int64", "int32"), (Int64Inputs(), "int32", "int64")]
)
def test_input_types_change_and_results_do_not(apply, old, new):
    model = read(TEXT.format(dtype=old), 17)
    subject = Subject.of(model)
    assert isinstance(apply.apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result, full_check=True)
    ids, table = np.array([[8, 0, 3]]), np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    expected = in_onnxruntime(model)({"ids": ids.astype(old), "table": table})
    found = in_onnxruntime(result)({"ids": ids.astype(new), "table": table})
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert found["same"].dtype == old
    assert isinstance(apply.apply(subject), Unchanged)


def test_a_copy_of_the_model_keeps_its_types():
    subject = Subject.of(Decoder(Config(layers=1)).model())
    copy = copy_model(subject.model)
    assert isinstance(Int32Inputs().apply(subject), Changed)
    assert {value.dtype for value in copy.graph.inputs} == {ir.DataType.INT64}
