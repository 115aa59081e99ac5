"""Compute the keys and values of later layers from the attention input of one layer, by ridge regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.calibration.head_maps import head_columns
from kvsurgeon.calibration.moments import Matrix, SecondMoment
from kvsurgeon.calibration.shared_heads import SharedHeads, find_shared_heads
from kvsurgeon.calibration.token_features import token_features
from kvsurgeon.calibration.weight_products import (
    FeatureChange,
    WeightProduct,
    change_features,
    check_readers,
    product_above,
)
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.layout import layout_of
from kvsurgeon.ops.table import contraction_of

_RIDGE = 1e-3  # of the mean second moment of the inputs


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A projection of which some features are to be computed from another input.

    Attributes:
        layer: Index of the first layer that reads it.
        product: The projection.
        width: Number of its features.
        columns: Those that are to be computed from another input; None for all.
    """

    layer: int
    product: WeightProduct
    width: int
    columns: np.ndarray | None

    @property
    def features(self) -> ir.Value:
        """All features of the projection."""
        return self.product.features


def project_single_input(
    analysis: Analysis, after: int, text: Path, folder: Path | None
) -> tuple[int, tuple[str, ...]]:
    """Compute keys and values of all layers behind layer `after` from the attention input of that layer.

    Args:
        analysis: The model, which is edited.
        after: Index of the layer.
        text: The text, on whose first half the model is run.
        folder: Folder of the model.

    Returns:
        Number of edits, and notes about the layer that is approximated worst.

    Raises:
        UnsupportedError: The projections cannot be found, or have inputs of another shape.
    """
    trace = IndexTrace(analysis.flow)
    found = find_shared_heads(analysis)
    cut = next(one for one in found if after in one.layers)
    source = _operand(trace, product_above(trace, cut.keys))
    later = (target for one in found if one.layers[0] > after for target in _targets(trace, one))
    targets = [target for target in later if _operand(trace, target.product) is not source]
    for target in targets:
        _check_shape(trace, source, target)
    if not targets:
        return 0, ()
    inputs, products, powers = _measure(analysis, source, targets, text, folder)
    width = len(inputs) - 1
    ridge = np.append(np.full(width, _RIDGE * float(np.trace(inputs[:width, :width])) / width), 0)
    editor, lost = Editor(analysis.model), []
    for target, product, power in zip(targets, products, powers, strict=True):
        weights: Matrix = np.linalg.solve(inputs + np.diag(ridge), product).astype(np.float64)
        explained = float(np.sum(weights * (2 * product - inputs @ weights)))
        lost.append((1 - explained / max(power, 1e-30), target))
        _replace(editor, source, target, weights, analysis.shapes[source].dtype or ir.DataType.FLOAT)
    editor.finish()
    share, worst = max(lost, key=lambda one: one[0])
    return editor.edits, (f"{share:.1%} of `{worst.features.name}` of layer {worst.layer} is lost, the most of all",)


def _operand(trace: IndexTrace, product: WeightProduct) -> ir.Value:
    """Return the token data that a projection reads."""
    found = contraction_of(trace.flow.shapes.call(product.node))
    weights = product.operands[0].index
    assert found is not None
    value = product.node.inputs[found.left if weights == found.right else found.right]
    assert value is not None
    return value


def _targets(trace: IndexTrace, one: SharedHeads) -> list[_Target]:
    """Return the projections of some layers' keys and values, each once."""
    flow = trace.flow
    queries = {product_above(trace, value).node for value in one.queries}
    columns: dict[ir.Node, list[np.ndarray]] = {}
    products: dict[ir.Node, WeightProduct] = {}
    for value in (one.keys, one.values):
        product = product_above(trace, value)
        check_readers(flow, product, one.ends)
        products[product.node] = product
        used = columns.setdefault(product.node, [])
        if product.node in queries:
            used.append(head_columns(flow, product.features, value, one.kv_heads).reshape(-1))
    return [
        _Target(
            layer=one.layers[0], product=product, width=layout_of(flow, product.features).width,
            columns=np.concatenate(used) if used else None,
        )
        for product, used in zip(products.values(), columns.values(), strict=True)
    ]  # fmt: skip


def _check_shape(trace: IndexTrace, source: ir.Value, target: _Target) -> None:
    given, own, features = (
        trace.flow.shapes[value] for value in (source, _operand(trace, target.product), target.features)
    )
    shape, own_shape = given.shape or (), own.shape or ()
    same_types = given.dtype is own.dtype is features.dtype
    if shape != own_shape or shape[:-1] != (features.shape or ())[:-1] or not same_types:
        raise UnsupportedError(
            "keys or values of a later layer are computed from an input of another shape or type",
            code=Code.UNTRACEABLE_HEADS, at=target.features.name, layer=target.layer,
            expected=f"{given.dtype} {list(shape)}", found=f"{own.dtype} {list(own_shape)} to {features.dtype}",
        )  # fmt: skip


def _measure(
    analysis: Analysis, source: ir.Value, targets: Sequence[_Target], text: Path, folder: Path | None
) -> tuple[Matrix, list[Matrix], list[float]]:
    """Return the second moment of the input with a constant 1, its products with the features, and their powers."""
    inputs: SecondMoment | None = None
    products: list[Matrix] = []
    powers = [0.0] * len(targets)
    for features in token_features(analysis, [source, *(one.features for one in targets)], text, folder):
        rows = features[source].astype(np.float64)
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        wanted = [_selected(features[one.features], one.columns).astype(np.float64) for one in targets]
        if inputs is None:
            inputs = SecondMoment(rows.shape[1])
            products = [np.zeros((rows.shape[1], one.shape[1])) for one in wanted]
        inputs.add(rows)
        for place, one in enumerate(wanted):
            products[place] += rows.T @ one
            powers[place] += float(np.sum(one**2))
    assert inputs is not None
    inputs.check(source.name or "")
    return inputs.total, products, powers


def _selected(features: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    return features if columns is None else features[:, columns]


def _replace(editor: Editor, source: ir.Value, target: _Target, weights: Matrix, dtype: ir.DataType) -> None:
    """Compute features of a projection as `source @ weights`, whose last row is a bias; others stay as they are."""
    features, columns = target.features, target.columns
    users = list(features.uses())
    if columns is not None:
        whole = np.zeros((len(weights), target.width))
        whole[:, columns] = weights
        weights = whole
        nothing = FeatureChange(target=columns, source=columns[:0], matrix=np.zeros((0, len(columns))))
        change_features(editor, target.product, [nothing])
    name = features.name or "features"

    def stored(array: Matrix, suffix: str) -> ir.Value:
        tensor = ir.Tensor(array.astype(dtype.numpy()), name=editor.unique_name(f"{name}.{suffix}"))
        return editor.initializer(tensor)

    product = editor.node("MatMul", [source, stored(weights[:-1], "weights")], name=f"{name}.single_input", dtype=dtype)
    result = editor.node("Add", [product, stored(weights[-1], "bias")], name=f"{name}.fitted", dtype=dtype)
    if columns is not None:
        result = editor.node("Add", [features, result], name=f"{name}.joined", dtype=dtype)
    for node, index in users:
        editor.replace_input(node, index, result)
