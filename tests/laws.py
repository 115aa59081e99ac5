"""The law of correct caches: chunks of a text give the same rows as the whole.

Independent of kvsurgeon's verifier: the dims that a model declares give the feeds of each call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

Arrays = dict[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray]], Arrays]

# Largest difference, divided by the range of the reference's values: sums in another order, nothing else.
ALLOWED = {"float32": 2e-5, "float16": 1e-2}
CUTS = (4, 5, 6)  # a prefill, single tokens, and a chunk


def in_onnxruntime(model: onnx.ModelProto, *, optimized: bool = False) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def in_reference(model: onnx.ModelProto) -> Run:
    evaluator = ReferenceEvaluator(model)
    return lambda feeds: dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))


def dims_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [
        size.dim_value if size.HasField("dim_value") else size.dim_param for size in value.type.tensor_type.shape.dim
    ]


def texts(model: onnx.ModelProto, batch: int = 2, length: int = 9, *, padded: bool = True, seed: int = 0) -> Arrays:
    """Return the inputs of a model without a cache: tokens or embeddings, mask, positions.

    Rows after the first have left padding if there is a mask.
    """
    random = np.random.default_rng(seed)
    mask = np.ones((batch, length), dtype=np.int64)
    names = {value.name for value in model.graph.input}
    if padded and "attention_mask" in names:
        for row in range(1, batch):
            mask[row, : 2 * row] = 0
    feeds: Arrays = {}
    for value in model.graph.input:
        dims = dims_of(value)
        if value.name == "attention_mask":
            feeds[value.name] = mask
        elif value.name == "position_ids":
            feeds[value.name] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        elif len(dims) == 3:
            drawn = random.standard_normal((batch, length, dims[2]))
            feeds[value.name] = drawn.astype(np.float32)
        else:
            feeds[value.name] = random.integers(0, 7, (batch, length))
    return feeds


def in_chunks(model: onnx.ModelProto, run: Run, whole: Arrays, cuts: Sequence[int]) -> list[Arrays]:
    """Run a model with a cache in chunks, and return the outputs of each call without the cache."""
    inputs = {value.name: dims_of(value) for value in model.graph.input}
    batch = next(iter(whole.values())).shape[0]
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    sizes = {"batch_size": batch, "past_sequence_length": 0}
    pasts = {
        name: np.zeros([sizes.get(size, size) for size in dims], onnx.helper.tensor_dtype_to_np_dtype(types[name]))
        for name, dims in inputs.items()
        if name not in whole
    }
    presents = [value.name for value in model.graph.output if value.name.startswith("present")]
    sizes |= {size: array.shape[axis] for name, array in whole.items() for axis, size in enumerate(inputs[name])}
    length = sizes["sequence_length"]
    steps = []
    for start, stop in itertools.pairwise((0, *cuts, length)):
        feeds = {name: _part(array, inputs[name], start, stop) for name, array in whole.items()}
        found = run({**feeds, **pasts})
        pasts = {name: found.pop(present) for name, present in zip(list(pasts), presents, strict=True)}
        steps.append(found)
    return steps


def _part(array: np.ndarray, dims: Sequence[int | str], start: int, stop: int) -> np.ndarray:
    spans = {"sequence_length": slice(start, stop), "total_sequence_length": slice(0, stop)}
    return np.asarray(array[tuple(spans.get(str(size), slice(None)) for size in dims)])


def difference(found: np.ndarray, expected: np.ndarray, counts: np.ndarray | None = None) -> float:
    """Return the largest difference at tokens that count, divided by the range of the expected values."""
    assert found.shape == expected.shape
    gap = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    if counts is not None:
        gap = gap[counts == 1]
    return float(gap.max() / np.ptp(expected.astype(np.float64)))


def assert_law(
    original: onnx.ModelProto, injected: onnx.ModelProto, whole: Arrays | None = None, cuts: Sequence[int] = CUTS,
    *, start: Callable[[onnx.ModelProto], Run] = in_onnxruntime, output: str = "logits",
) -> None:  # fmt: skip
    """Assert that a model with a cache gives the same in chunks as the reference model for the whole text."""
    whole = texts(original) if whole is None else whole
    expected = start(original)(whole)[output]
    found = [step[output] for step in in_chunks(injected, start(injected), whole, cuts)]
    counts = whole.get("attention_mask")
    if expected.shape[1] == 1:  # the row of the last token only
        found = found[-1:]
        counts = None
    gap = difference(np.concatenate(found, axis=1), expected, counts)
    assert gap <= ALLOWED[str(expected.dtype)], f"error {gap:.1e} of the range"
