"""Some nodes of a graph run alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from written import read

from kvsurgeon.graph.execution import build_model, initializer, open_session

TEXT = """case (float[n, 2] x) => (float[n, 2] y) {
  a = Neg(x)
  b = Exp(a)
  y = Add(b, c)
}"""


def test_nodes_run_on_fed_values_and_constants():
    graph = ir.from_proto(read(TEXT)).graph
    constant = initializer("c", ir.Tensor(np.array([1, 2], np.float32), name="other"))
    model = build_model(
        graph, inputs={"b": (ir.DataType.FLOAT, 2), "x": (1, 2)}, outputs=["y"], opsets=graph.opset_imports,
        initializers=[constant],
    )  # fmt: skip
    feeds = {name: np.full((3, 2), 5, np.float32) for name in ("b", "x")}
    (y,) = open_session(model).run(None, feeds)
    assert (y == [6, 7]).all()  # of the `b` that is fed, not of the computed one
