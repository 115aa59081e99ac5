"""gather-nd-to-gather reindices GatherND with one index by Gather."""

import numpy as np
import pytest
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.gather_nd_to_gather import GatherNdToGather

MODEL = """case (float[b, 4, 3] x, int64[2, 5, 1] indices) => (float[2, 5, 4, 3] y)
{
  rows = GatherND(x, indices)
  y = Identity(rows)
}"""


def test_gather_selects_the_same_rows():
    model = read(MODEL)
    subject = Subject.of(model)
    assert isinstance(GatherNdToGather().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert "GatherND" not in {node.op_type for node in result.graph.node}
    random = np.random.default_rng(0)
    feeds = {"x": random.normal(size=(6, 4, 3)).astype(np.float32), "indices": random.integers(-6, 6, (2, 5, 1))}
    assert np.array_equal(in_onnxruntime(result)(feeds)["y"], in_onnxruntime(model)(feeds)["y"])
    assert isinstance(GatherNdToGather().apply(subject), Unchanged)


@pytest.mark.parametrize(
    "text",
    [
        MODEL.replace("5, 1]", "5, 2]").replace("float[2, 5, 4, 3]", "float[2, 5, 3]"),
        MODEL.replace("GatherND(", "GatherND<batch_dims = 1>(").replace("[b, 4", "[2, 4").replace("5, 4, 3", "5, 3"),
    ],
)
def test_several_indices_and_batch_dims_are_unchanged(text):
    assert isinstance(GatherNdToGather().apply(Subject.of(read(text))), Unchanged)
