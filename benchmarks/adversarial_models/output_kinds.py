"""Decoders with a further output, or with logits of another shape: each is to mean the same with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random

from onnx import TensorProto

from adversarial_models.decoder import Context, Design
from adversarial_models.draft import Draft

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
Output = Callable[[Context, str], str]
"""Takes the context and the logits; returns the further output."""


@dataclass(frozen=True, kw_only=True)
class OutputKind:
    """A further output, its type and its dims."""

    name: str
    write: Output
    kind: int = FLOAT
    dims: str = ""
    is_logits: bool = False  # replaces the logits
    plain: bool = False  # one row per new token, computed of that token alone


def draw_output_kind(random: Random, kind: OutputKind, design: Design) -> Draft:
    """Return a decoder with a further output."""

    def change(context: Context, logits: str) -> str:
        value = kind.write(context, logits)
        if kind.is_logits:
            context.values["logits_shape"] = kind.dims
            return value
        context.values["extra"] = value
        context.values["extra_shape"] = f"{kind.kind}:{kind.dims.format(heads=design.heads)}"
        return logits

    if kind.name.startswith("mask-input"):
        design = replace(design, has_mask=True)
    return Draft(design=replace(design, changes={"logits": change}), place="output", threshold=None, variant=kind.name)


def _one(context: Context, name: str, *, kind: int = FLOAT) -> str:
    return str(context.write("Cast", context.values[name], to=kind))


def _kinds() -> list[OutputKind]:
    def w(context: Context) -> Callable[..., str]:
        return context.write

    def count(context: Context) -> str:
        return str(context.write.reduce("ReduceSum", "attention_mask", [1]))

    grid, by_head = "seq,seq", "batch,{heads},seq,seq"
    return [
        OutputKind(name="length", write=lambda c, _: c.total, kind=INT, dims="1"),
        OutputKind(name="length-scalar", write=lambda c, _: w(c)("Squeeze", c.total), kind=INT),
        OutputKind(name="length-float", write=lambda c, _: c.write.to_float(c.total), dims="1"),
        OutputKind(
            name="length-per-token",
            write=lambda c, _: w(c)("Div", c.write.to_float(c.positions), c.write.to_float(c.total)),
            dims="seq",
        ),
        OutputKind(name="size-of-logits", write=lambda c, x: w(c)("Shape", x), kind=INT, dims="3"),
        OutputKind(name="positions", write=lambda c, _: c.positions, kind=INT, dims="seq"),
        OutputKind(name="positions-2d", write=lambda c, _: c.key_positions, kind=INT, dims="1,seq"),
        OutputKind(
            name="positions-from-end", write=lambda c, _: w(c)("Sub", c.total, c.positions), kind=INT, dims="seq"
        ),
        OutputKind(name="last-position", write=lambda c, _: w(c)("Sub", c.total, 1), kind=INT, dims="1"),
        OutputKind(
            name="largest-position",
            write=lambda c, _: c.write.reduce("ReduceMax", c.positions, [0]),
            kind=INT,
            dims="1",
        ),
        OutputKind(name="causal", write=lambda c, _: _one(c, "causal"), dims=grid),
        OutputKind(name="causal-bool", write=lambda c, _: _one(c, "causal", kind=BOOL), kind=BOOL, dims=grid),
        OutputKind(
            name="causal-row-sums",
            write=lambda c, _: c.write.reduce("ReduceSum", _one(c, "causal"), [-1]),
            dims="seq,1",
        ),
        OutputKind(
            name="causal-column-sums",
            write=lambda c, _: c.write.reduce("ReduceSum", _one(c, "causal"), [-2]),
            dims="1,seq",
        ),
        OutputKind(name="mask-input-allowed", write=lambda c, _: _one(c, "allowed"), dims="batch,1,seq,seq"),
        OutputKind(
            name="mask-input", write=lambda c, _: w(c)("Identity", "attention_mask"), kind=INT, dims="batch,seq"
        ),
        OutputKind(name="mask-input-count", write=lambda c, _: count(c), kind=INT, dims="batch,1"),
        OutputKind(
            name="mask-input-positions",
            write=lambda c, _: w(c)("Sub", w(c)("CumSum", "attention_mask", 1), 1),
            kind=INT,
            dims="batch,seq",
        ),
        OutputKind(name="scores", write=lambda c, _: _one(c, "scores"), dims=by_head),
        OutputKind(name="probabilities", write=lambda c, _: _one(c, "probabilities"), dims=by_head),
        OutputKind(
            name="mean-probabilities",
            write=lambda c, _: c.write.reduce("ReduceMean", c.values["probabilities"], [1]),
            dims="batch,1,seq,seq",
        ),
        OutputKind(
            name="attention-received",
            write=lambda c, _: c.write.reduce("ReduceSum", c.values["probabilities"], [2]),
            dims="batch,{heads},1,seq",
        ),
        OutputKind(
            name="transposed-scores",
            write=lambda c, _: w(c)("Transpose", c.values["scores"], perm=[0, 1, 3, 2]),
            dims=by_head,
        ),
        OutputKind(name="hidden", write=lambda c, _: c.values["hidden"], dims="batch,seq,32", plain=True),
        OutputKind(
            name="pooled-mean",
            write=lambda c, _: c.write.reduce("ReduceMean", c.values["hidden"], [1]),
            dims="batch,1,32",
        ),
        OutputKind(name="pooled-max", write=lambda c, x: c.write.reduce("ReduceMax", x, [1]), dims="batch,1,97"),
        OutputKind(name="all-max", write=lambda c, x: c.write.reduce("ReduceMax", x, None, keepdims=0)),
        OutputKind(
            name="tokens",
            write=lambda c, x: w(c)("ArgMax", x, axis=-1, keepdims=0),
            kind=INT,
            dims="batch,seq",
            plain=True,
        ),
        OutputKind(
            name="log-probabilities", write=lambda c, x: w(c)("LogSoftmax", x, axis=-1), dims="batch,seq,97", plain=True
        ),
        OutputKind(
            name="next-token-scores", write=lambda c, x: w(c)("Gather", x, c.write.value(-1), axis=1), dims="batch,97"
        ),
        OutputKind(
            name="first-token-scores", write=lambda c, x: w(c)("Gather", x, c.write.value(0), axis=1), dims="batch,97"
        ),
        OutputKind(
            name="shifted-ids",
            write=lambda c, _: w(c)("Slice", "input_ids", [1], [2**62], [1]),
            kind=INT,
            dims="batch,rest",
        ),
        OutputKind(
            name="ids", write=lambda c, _: w(c)("Identity", "input_ids"), kind=INT, dims="batch,seq", plain=True
        ),
        OutputKind(
            name="count-of-token",
            write=lambda c, _: c.write.reduce("ReduceSum", w(c)("Cast", w(c)("Equal", "input_ids", 3), to=INT), [1]),
            kind=INT,
            dims="batch,1",
        ),
        OutputKind(
            name="running-count",
            write=lambda c, _: w(c)("CumSum", w(c)("Cast", w(c)("Equal", "input_ids", 3), to=INT), 1),
            kind=INT,
            dims="batch,seq",
        ),
        OutputKind(name="running-sum", write=lambda c, x: w(c)("CumSum", c.values["hidden"], 1), dims="batch,seq,32"),
        OutputKind(
            name="flat-logits", write=lambda c, x: w(c)("Reshape", x, [-1, 97]), dims="tokens,97", is_logits=True
        ),
        OutputKind(
            name="turned-logits",
            write=lambda c, x: w(c)("Transpose", x, perm=[1, 0, 2]),
            dims="seq,batch,97",
            is_logits=True,
        ),
        OutputKind(
            name="channels-first-logits",
            write=lambda c, x: w(c)("Transpose", x, perm=[0, 2, 1]),
            dims="batch,97,seq",
            is_logits=True,
        ),
        OutputKind(
            name="last-logits",
            write=lambda c, x: w(c)("Slice", x, [-1], [2**62], [1]),
            dims="batch,1,97",
            is_logits=True,
        ),
        OutputKind(
            name="second-to-last",
            write=lambda c, x: w(c)("Slice", x, [-2], [-1], [1]),
            dims="batch,1,97",
            is_logits=True,
        ),
        OutputKind(
            name="reversed-logits",
            write=lambda c, x: w(c)("Slice", x, [-1], [-(2**62)], [1], [-1]),
            dims="batch,seq,97",
            is_logits=True,
        ),
    ]


KINDS: Mapping[str, OutputKind] = {kind.name: kind for kind in _kinds()}
