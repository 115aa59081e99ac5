"""Real exports, small enough to lie in `corpus/`, and a decoder written by hand: each injected once for all tests."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx
from decoders import Config, Decoder

from kvsurgeon import io
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Pass, Subject

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path.stem for path in CORPUS.glob("*.onnx"))
NAMES = [*FILES, "decoder"]
ONE_OF_EACH = [
    "bloom_torchscript_eager",
    "gemma2_dynamo_eager",
    "gpt2_torchscript_sdpa",
    "llama_dynamo_sdpa",
    "neox_torchscript_eager",
]


@functools.cache
def export(name: str) -> onnx.ModelProto:
    """Return a model without a cache; do not modify it."""
    return Decoder(Config(layers=2)).model() if name == "decoder" else onnx.load(CORPUS / f"{name}.onnx")


def injected(model: onnx.ModelProto, **options: str) -> onnx.ModelProto:
    """Return the model with a cache, after onnx.checker."""
    subject = Subject.of(model)
    assert isinstance(Inject(**options).apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result)
    return result


def after(model: onnx.ModelProto, *passes: Pass) -> onnx.ModelProto:
    """Return the model after passes, each of which changes it."""
    subject = Subject.of(model)
    for one in passes:
        outcome = one.apply(subject)
        assert isinstance(outcome, Changed), outcome
        subject.changed()
    return io.to_proto(subject.model)


def operators(model: onnx.ModelProto) -> list[str]:
    """Return the operator of each node."""
    return [node.op_type for node in model.graph.node]


@functools.cache
def injected_export(name: str) -> onnx.ModelProto:
    """Return one of the exports with a cache; do not modify it."""
    return injected(export(name))


def with_all_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every value that a node makes as an output, behind its own."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    shown = {value.name for value in wide.graph.output}
    for node in wide.graph.node:
        wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name and name not in shown)
    return wide
