"""Random rounding of a model, to measure how far rounding alone moves its outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.parity.arithmetic.tolerance import ROUNDED, arithmetic_of
from kvsurgeon.parity.model_source import ModelSource
from kvsurgeon.parity.reference_model import ReferenceModel
from kvsurgeon.parity.scenarios import Scenario
from kvsurgeon.runtime import Optimization, Tokens

_LARGEST = 1 << 30  # bytes of a model, which is copied
_TEXTS = 3  # on which random rounding is measured
_OF_ROUNDING = 0.5  # weight of this noise: several texts show most of the largest error
_FLIPS = 8.0  # roundings, so that integers change in some of a few runs if rounding may change them
_PRODUCTS = {"Conv", "Gather", "Gemm", "MatMul", "MatMulNBits"}
_ROUNDING: dict[int, float] = {  # largest relative error of a number of this type
    TensorProto.BFLOAT16: 2.0**-9,
    TensorProto.FLOAT16: 2.0**-12,
    TensorProto.FLOAT: 2.0**-24,
    TensorProto.DOUBLE: 2.0**-53,
}


@dataclass(frozen=True)
class ReferenceNoise:
    """The noise of a reference model: how far its outputs move by rounding alone.

    Attributes:
        reference: The reference model.
        source: Its file.
        optimization: Level of onnxruntime's graph optimization.
        seed: Random seed of the text.
    """

    reference: ReferenceModel
    source: ModelSource
    optimization: Optimization
    seed: int

    @cached_property
    def rounds(self) -> bool:
        """Whether the model rounds activations to 8 bits."""
        return arithmetic_of(self.source.graph) in ROUNDED

    @cached_property
    def largest(self) -> float:
        """Largest error of the reference on random texts, with sums in another order, and with other rounding.

        Without graph optimization it adds in another order. It is 0 if neither can be run.
        """
        random, size = (
            np.random.default_rng(self.seed),
            (self.reference.decoder.batch or 1, self.reference.lengths.long),
        )
        texts = [random.integers(0, self.reference.vocabulary, size) for _ in range(_TEXTS)]
        rounded = (_OF_ROUNDING * self._distance(self._rounded_once, text) for text in texts)
        return max(self.reference.noise, self._distance(self._unoptimized, texts[0]), *rounded)

    def on(self, scenario: Scenario, output: str) -> float:
        """Return the largest error of an output on one text, where rounding may count for more than on random texts.

        It does where two keys or tokens are almost equal. Any output but the main one is that of the text without
        padding, of which it may hold rows.
        """
        others = (self._unoptimized, *[self._rounded_once] * _TEXTS)
        mask = scenario.mask if output == self.reference.main else None
        return max(self._distance(other, scenario.tokens, mask, output) for other in others)

    def stable_tokens(self, scenario: Scenario, bound: float) -> npt.NDArray[np.bool_] | None:
        """Return which tokens of a text rounding alone moves by no more than a bound, `[batch, sequence]`.

        Trained models have tokens at which a sum cancels out: their logits move a hundred times as far as others.
        None is returned if that cannot be measured.
        """
        largest = np.zeros(scenario.mask.shape)
        for other in (self._unoptimized, *[self._rounded_once] * _TEXTS):
            try:
                errors = None if other is None else self.reference.token_errors(other, scenario)
            except KvsurgeonError:
                errors = None
            if errors is None:
                return None
            largest = np.maximum(largest, errors)
        return largest <= bound

    def _distance(
        self, other: ReferenceModel | None, tokens: Tokens, mask: Tokens | None = None, output: str | None = None
    ) -> float:
        """Return the error of the reference in another session; 0 if that cannot be run."""
        if other is None:
            return 0.0
        try:
            return self.reference.distance_to(other, tokens, mask, output)
        except KvsurgeonError:
            return 0.0

    @cached_property
    def rounded(self) -> ReferenceModel | None:
        """The reference with random rounding of several times the usual size; None if it cannot be had."""
        return self._rounded(_FLIPS)

    @cached_property
    def _rounded_once(self) -> ReferenceModel | None:
        return self._rounded(1.0)

    @cached_property
    def _unoptimized(self) -> ReferenceModel | None:
        try:
            return self.reference.on(self.source.open("off"))
        except KvsurgeonError:
            return None

    def _rounded(self, times: float) -> ReferenceModel | None:
        graph = with_random_rounding(self.source.graph, times)
        if graph is None:
            return None
        try:
            return self.reference.on(replace(self.source, source=graph, graph=graph).open(self.optimization))
        except KvsurgeonError:
            return None


def with_random_rounding(model: onnx.ModelProto, times: float) -> onnx.ModelProto | None:
    """Return a copy of a model in which each product with weights, and each running sum, has random errors.

    They differ in each call. None is returned if the model is large, or has no product with floating-point weights
    outside of functions and subgraphs. A running sum whose type is not declared has none.

    Args:
        model: The model, without its external weights.
        times: Largest error, as a multiple of that of one rounding.
    """
    if model.ByteSize() > _LARGEST:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    types = {one.name: one.data_type for one in copy.graph.initializer if one.data_type in _ROUNDING}
    declared = {one.name: one.type.tensor_type.elem_type for one in copy.graph.value_info}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        nodes.append(node)
        weight = next((name for name in node.input if name in types), None)
        rounded = types.get(weight or "") if node.op_type in _PRODUCTS else None
        if node.op_type == "CumSum":
            rounded = declared.get(node.output[0])
        if rounded in _ROUNDING:
            exact, output = f"{node.output[0]}.exact", node.output[0]
            node.output[0] = exact
            nodes += _rounded(exact, output, rounded, times, seed=len(nodes))
    if len(nodes) == len(copy.graph.node):
        return None
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def _rounded(value: str, output: str, onnx_type: int, times: float, seed: int) -> list[onnx.NodeProto]:
    """Return the nodes that multiply each number by `1 + error`, with random errors."""
    wide = TensorProto.DOUBLE if onnx_type == TensorProto.DOUBLE else TensorProto.FLOAT
    names = {step: f"{value}.{step}" for step in ("wide", "error", "added", "sum")}
    error = times * _ROUNDING[onnx_type]
    limits: dict[str, Any] = {"low": -error, "high": error, "seed": float(seed)}
    return [
        helper.make_node("Cast", [value], [names["wide"]], to=wide),
        helper.make_node("RandomUniformLike", [names["wide"]], [names["error"]], **limits),
        helper.make_node("Mul", [names["wide"], names["error"]], [names["added"]]),
        helper.make_node("Add", [names["wide"], names["added"]], [names["sum"]]),
        helper.make_node("Cast", [names["sum"]], [output], to=onnx_type),
    ]
