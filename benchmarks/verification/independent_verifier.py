"""Run an injected model in onnxruntime and compare it with stored logits.

A second verifier: it shares no code with `kvsurgeon.parity`, and knows the injected model only by its contract of
inputs and outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from verification.corpus import Case

BATCH, NEW, TOTAL, PAST = "batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"
ANY = -1  # the size of an axis that is given whole in every call
# optimum, whose exports test this verifier, writes the total as a sum
TOTALS = frozenset({TOTAL, "past_sequence_length + sequence_length"})
NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Largest accepted difference between an injected model and the stored logits."""

    name: str
    error: float  # largest difference, over the spread of the reference
    agreement: float  # least share of positions with the same argmax, or one as likely
    reason: str


TIE = 0.05  # of the spread: two logits that are nearer are as likely as each other
EXACT = Bound(name="float32", error=1e-3, agreement=0.0, reason="summation order only; float64 and int4 weights too")
HALF = Bound(name="float16", error=0.05, agreement=0.0, reason="11 bits, and products in another order")
BRAIN = Bound(name="bfloat16", error=0.1, agreement=0.0, reason="8 bits")
DYNAMIC = Bound(name="dynamic", error=0.35, agreement=0.9, reason="ranges depend on the tokens that share a call")

STATIC_OPERATORS = frozenset({"QuantizeLinear", "QLinearMatMul", "QGemm"})
DYNAMIC_OPERATORS = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})


class ContractError(Exception):
    """The injected model's inputs and outputs are not those that were promised."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Result of one chunking of one case."""

    case: int
    chunking: str
    error: float
    agreement: float  # share of positions with the same argmax, or one as likely
    positions: int  # compared: all that are not padding
    position: int  # where the largest difference is


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The inputs and outputs of an injected model, by content."""

    given: dict[str, list[str | int]]  # inputs of the original, with their dims; `ANY` if not of batch or tokens
    pasts: dict[str, tuple[list[str | int], np.dtype]]
    presents: list[str]  # paired with the pasts, in order
    answer: str
    token_axis: int  # of the answer


def is_rounded(model: onnx.ModelProto) -> bool:
    """Whether activations are rounded to ranges that are fixed beforehand."""
    return bool(_operators(model) & STATIC_OPERATORS)


def _operators(model: onnx.ModelProto) -> set[str]:
    operators = {node.op_type for node in model.graph.node}
    return operators | {node.op_type for function in model.functions for node in function.node}


def bound_of(model: onnx.ModelProto) -> Bound:
    """Return the bound for the arithmetic that most of a model's weights are in."""
    if _operators(model) & DYNAMIC_OPERATORS:
        return DYNAMIC
    constants = [a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute]
    elements: Counter[int] = Counter()
    for tensor in (*model.graph.initializer, *constants):
        elements[tensor.data_type] += int(np.prod(tensor.dims)) if len(tensor.dims) else 1
    kinds = {onnx.TensorProto.FLOAT: EXACT, onnx.TensorProto.FLOAT16: HALF, onnx.TensorProto.BFLOAT16: BRAIN}
    floats = {kind: elements[kind] for kind in kinds}
    return kinds[max(floats, key=lambda kind: floats[kind])]


def open_session(
    model: onnx.ModelProto | Path,
    folder: Path,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    *,
    arena: bool = True,
) -> ort.InferenceSession:
    """Return a session on one thread; external weights of a model in memory are looked for in `folder`.

    Without an arena it is slower, and frees the memory of a call.
    """
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = arena
    options.graph_optimization_level = level
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def read_contract(session: ort.InferenceSession, original: onnx.ModelProto) -> Contract:
    """Return what the injected model takes and gives.

    Raises:
        ContractError: It has no past, or a past without a present, or an answer under another name.
    """
    weights = {tensor.name for tensor in original.graph.initializer}
    known = {value.name for value in original.graph.input} - weights
    answers = [value.name for value in original.graph.output]
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    pasts = {i.name: (i.shape, np.dtype(NUMPY_TYPES[i.type])) for i in inputs if i.name.startswith("past_key_values.")}
    new = {name: past for name, past in pasts.items() if name not in known}
    if not new:
        raise ContractError("unchanged: no `past_key_values` input was added")
    if lost := [name for name in answers if name not in outputs]:
        raise ContractError(f"output `{lost[0]}` of the original is gone")
    expected = {name.replace("past_key_values.", "present.") for name in new}
    presents = [name for name in outputs if name not in answers or name in expected]
    if [name.removeprefix("past_key_values.") for name in new] != [p.removeprefix("present.") for p in presents]:
        raise ContractError(f"pasts {list(new)[:3]}... are not paired in order with presents {presents[:3]}...")
    own = {value.name: _own_names(value) for value in original.graph.input}
    given = {
        i.name: [ANY if dim in own.get(i.name, ()) else dim for dim in i.shape] for i in inputs if i.name not in new
    }
    dims = next(list(output.shape) for output in session.get_outputs() if output.name == answers[0])
    axis = dims.index(NEW) if dims.count(NEW) == 1 else 1
    return Contract(given=given, pasts=new, presents=presents, answer=answers[0], token_axis=axis)


def _own_names(value: onnx.ValueInfoProto) -> set[str]:
    """Return the names of an input's dims that are not of the contract: sizes that are neither batch nor tokens."""
    names = {dim.dim_param for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    return names - {BATCH, NEW, PAST, *TOTALS}


def score_case(session: ort.InferenceSession, contract: Contract, case: Case, *, ragged: bool = True) -> list[Score]:
    """Return a score for each chunking of one case; without those that give several tokens after a past if asked."""
    scores = []
    for chunking, chunks in CHUNKINGS.items():
        if chunking == "ragged chunks" and not ragged:
            continue
        result = _decode(session, contract, case, chunks(case.total))
        scores.append(_compare(result, case, chunking))
    return scores


def failures(scores: Sequence[Score], bound: Bound) -> list[Score]:
    """Return the scores out of bounds; agreement is taken over all cases, as one flip weighs much in a short one."""
    failed = [score for score in scores if not score.error <= bound.error]
    for chunking in CHUNKINGS:
        same = [score for score in scores if score.chunking == chunking]
        agreed = sum(score.agreement * score.positions for score in same)
        if agreed < bound.agreement * sum(score.positions for score in same):
            failed.append(min(same, key=lambda score: score.agreement))
    return failed


def _at_once(total: int) -> list[int]:
    return [total]


def _token_by_token(total: int) -> list[int]:
    first = min(4, total)
    return [first] + [1] * (total - first)


def _ragged(total: int) -> list[int]:
    chunks: list[int] = []
    for size in cycle((1, 5, 2, 7, 3)):
        if total <= 0:
            break
        chunks.append(min(size, total))
        total -= size
    return chunks


CHUNKINGS: dict[str, Callable[[int], list[int]]] = {
    "prefill": _at_once,
    "token by token": _token_by_token,
    "ragged chunks": _ragged,
}


def _decode(session: ort.InferenceSession, contract: Contract, case: Case, chunks: Sequence[int]) -> np.ndarray:
    """Return the logits `[batch, total, ...]` of a case given in chunks, each with the past of those before.

    Of a model that answers for the last tokens of a call alone as many are kept as the reference has.
    """
    cache = {
        name: np.zeros(empty_sizes(name, dims, case.batch), dtype) for name, (dims, dtype) in contract.pasts.items()
    }
    answers, start, rows = [], 0, case.reference.shape[1]
    for size in chunks:
        feeds = {name: part_of(name, dims, case.inputs, start, start + size) for name, dims in contract.given.items()}
        answer, *presents = session.run([contract.answer, *contract.presents], {**feeds, **cache})
        answer = np.moveaxis(answer, contract.token_axis, 1) if answer.ndim > contract.token_axis else answer
        if answer.shape[:2] != (case.batch, min(size, rows)):
            raise ContractError(f"`{contract.answer}` has shape {answer.shape} for a call with {size} new tokens")
        answers.append(answer.astype(np.float32))
        cache = dict(zip(contract.pasts, presents, strict=True))
        start += size
    return np.concatenate(answers, axis=1)[:, -rows:]


def empty_sizes(name: str, dims: Sequence[str | int], batch: int) -> list[int]:
    """Return the shape of a past before the first token; a state of fixed size has no axis of tokens."""
    sizes = {BATCH: batch, PAST: 0}
    if PAST not in dims and not name.endswith(("conv_state", "recurrent_state")):
        raise ContractError(f"`{name}` has dims {list(dims)}, none of them `{PAST}`")
    if strangers := [dim for dim in dims if isinstance(dim, str) and dim not in sizes]:
        raise ContractError(f"`{name}` has dims {list(dims)}; `{strangers[0]}` is not of the contract")
    return [sizes[dim] if isinstance(dim, str) else dim for dim in dims]


def part_of(name: str, dims: Sequence[str | int], inputs: Mapping[str, np.ndarray], start: int, end: int) -> np.ndarray:
    """Return what a call over tokens `start` to `end` is given of an input: new ones, or all so far."""
    if name not in inputs:
        raise ContractError(f"nothing is given for input `{name}` with dims {list(dims)}")
    picks = []
    for dim in dims:
        if dim == NEW:
            picks.append(slice(start, end))
        elif dim in TOTALS:
            picks.append(slice(0, end))
        elif isinstance(dim, int) or dim not in ("", PAST):  # an input may have a batch of its own name
            picks.append(slice(None))
        else:
            raise ContractError(f"input `{name}` has dims {list(dims)}; `{dim}` is not of the contract")
    return np.asarray(inputs[name][tuple(picks)], order="C")


def _compare(result: np.ndarray, case: Case, chunking: str) -> Score:
    found, reference = result[case.real], case.reference[case.real]
    spread = float(reference.max() - reference.min()) or 1.0
    difference = np.abs(found - reference).reshape(len(found), -1).max(axis=1)
    difference = np.where(np.isfinite(difference), difference, np.inf)
    worst = int(difference.argmax())
    chosen = np.take_along_axis(reference, np.nan_to_num(found, nan=-np.inf).argmax(-1)[..., None], -1)[..., 0]
    return Score(
        case=case.index,
        chunking=chunking,
        error=float(difference[worst]) / spread,
        agreement=float((chosen >= reference.max(-1) - TIE * spread).mean()),
        positions=len(found),
        position=int(np.argwhere(case.real)[worst][1]),
    )
