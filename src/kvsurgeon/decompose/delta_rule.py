"""Replace linear attention that is computed in chunks, in an export of a fixed length, by one `Scan` over tokens.

The gated delta rule passes a state [heads, key_dim, value_dim] from token to token:

    state = exp(decay) * state;  state = state + key ⊗ (beta * (value - state^T key));  row = scale * state^T query

Exporters write a form that computes all tokens of a chunk at once: tokens are padded to whole chunks, a triangular
matrix is inverted row by row, and what reads the state of zeros may have been removed. Without `beta` the rule is
`state = exp(decay) * state + key ⊗ value`. A region is run on probe inputs next to the `Scan` that replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.decompose.chunked_regions import NARROW, Region, Source, find_regions
from kvsurgeon.decompose.scan_builder import remove_dead
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.execution import InputType, build_model, initializer, open_session, use_float32
from kvsurgeon.graph.query import is_operator

_DECAYS = (0.05, 1.0, 6.0)  # magnitudes of probe inputs
_CLOSE = 5e-4  # largest difference of a row, as a part of its largest element: sums in another order
_FLOAT = ir.DataType.FLOAT
_LEAST_TOKENS = 4  # of a text that shows a recurrence


def replace_chunked_rules(editor: Editor) -> None:
    """Replace each region that computes a gated delta rule in chunks by a `Scan`."""
    shapes = read_inputs(editor.graph).shapes
    for node in [node for node in editor.graph if is_operator(node, "CumSum")]:
        if node.graph is None:  # removed with another region
            continue
        for region, decay in find_regions(shapes, node):
            rules = (_computed(rule, region, editor.graph.opset_imports) for rule in _rules(region, decay))
            rule = next((one for one in rules if one is not None), None)
            if rule is not None:
                rule.replace(region, editor)
                remove_dead(editor.graph)
                break


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """A rule with its operands, and the number that its result is multiplied by."""

    query: Source
    key: Source
    value: Source
    decay: Source
    beta: Source | None
    scale: float = 1.0

    @property
    def operands(self) -> dict[str, Source]:
        """The operands by name."""
        named = {"q": self.query, "k": self.key, "v": self.value, "g": self.decay}
        return named if self.beta is None else {**named, "b": self.beta}

    def state_sizes(self) -> tuple[int, ...]:
        """Return the sizes of the state: [1, heads, key_dim, value_dim]."""
        return (1, self.key.sizes[1], self.key.sizes[2], self.value.sizes[2])

    def body(self, row: Sequence[int]) -> onnx.GraphProto:
        """Return the body for one token."""
        _, heads, keys, values = self.state_sizes()
        inputs = [f"float[{_text(self.state_sizes())}] s"]
        inputs += [f"float[{_text(one.sizes)}] {name}e" for name, one in self.operands.items()]
        shapes = {"q": (1, heads, 1, keys), "k": (1, heads, 1, keys), "v": (1, heads, 1, values), "b": (1, heads, 1, 1)}
        shapes["g"] = (1, heads, self.decay.sizes[2] if len(self.decay.sizes) > 2 else 1, 1)
        reshaped = [
            f"{name}s = Constant<value_ints = [{_text(shapes[name])}]>() {name} = Reshape({name}e, {name}s)"
            for name in self.operands
        ]
        new = "new = Identity(v)"
        if self.beta is not None:
            new = "predicted = MatMul(k, decayed) missing = Sub(v, predicted) new = Mul(missing, b)"
        return onnx.parser.parse_graph(
            f"""rule ({", ".join(inputs)}) => (float[{_text(self.state_sizes())}] after, float[{_text(row)}] row) {{
            {" ".join(reshaped)}
            kept = Exp(g) decayed = Mul(s, kept) {new}
            column = Transpose<perm = [0, 1, 3, 2]>(k) added = MatMul(column, new) after = Add(decayed, added)
            read = MatMul(q, after) scale = Constant<value_float = {self.scale!r}>() scaled = Mul(read, scale)
            rows = Constant<value_ints = [{_text(row)}]>() row = Reshape(scaled, rows)
            }}"""
        )

    def attributes(self, region: Region) -> dict[str, Any]:
        """Return the attributes of the `Scan` except its body."""
        axes = [one.axis for one in self.operands.values()]
        return {"num_scan_inputs": len(axes), "scan_input_axes": axes, "scan_output_axes": [region.axis]}

    def node(self, region: Region) -> onnx.NodeProto:
        """Return the `Scan` of `start` and the operands, whose second output is `rows`."""
        inputs = ["start", *(one.value.name or "" for one in self.operands.values())]
        return onnx.helper.make_node(
            "Scan", inputs, ["after", "rows"], body=self.body(region.row), **self.attributes(region)
        )

    def replace(self, region: Region, editor: Editor) -> None:
        """Replace the result of a region by the rows of a `Scan`."""
        body, name = ir.serde.deserialize_graph(self.body(region.row)), region.result.name
        for value in [*body.inputs, *(value for node in body for value in node.outputs)]:
            value.name = editor.unique_name(f"{name}.{value.name}")
        body.name = editor.unique_name(f"{name}.body")
        body.opset_imports.update(editor.graph.opset_imports)
        editor.before = region.result.producer()
        op = NodeBuilder(editor, name or "rows")
        start = editor.constant(np.zeros(self.state_sizes()), np.float32, "zeros")
        names = (editor.unique_name(f"{name}.{part}") for part in ("state", "rows"))
        outputs = [ir.Value(name=one, type=ir.TensorType(_FLOAT)) for one in names]
        wide = [one.value if one.dtype is _FLOAT else op.Cast(one.value, to=_FLOAT) for one in self.operands.values()]
        editor.operator("", "Scan", [start, *wide], {"body": body, **self.attributes(region)}, outputs)
        rows = outputs[1] if region.dtype is _FLOAT else op.Cast(outputs[1], to=region.dtype)
        rows.type, rows.shape = ir.TensorType(region.dtype), ir.Shape(region.shape)
        editor.replace(region.result, rows)


def _rules(region: Region, decay: ir.Value) -> Iterator[_Rule]:
    """Yield the rules that fit the sizes of the sources of a region."""
    decays = next((one for one in region.sources if one.value is decay), None)
    others = [one for one in region.sources if one is not decays]
    betas = [one for one in others if len(one.sizes) == 2]
    if decays is None or len(betas) != len(others) - 3 or region.tokens < _LEAST_TOKENS:
        return
    for query, key, value in permutations([one for one in others if one not in betas], 3):
        rule = _Rule(query=query, key=key, value=value, decay=decays, beta=betas[0] if betas else None)
        if _fits(rule, region):
            yield rule


def _fits(rule: _Rule, region: Region) -> bool:
    """Return whether all sizes are those of one sequence with the same heads, each with its state."""
    if len(rule.key.sizes) != 3 or rule.query.sizes != rule.key.sizes or rule.value.sizes != region.row:
        return False
    if any(one.sizes[:2] != rule.key.sizes[:2] for one in rule.operands.values()) or rule.key.sizes[0] != 1:
        return False
    return len(rule.decay.sizes) == 2 or rule.decay.sizes == rule.key.sizes


def _computed(rule: _Rule, region: Region, opsets: Mapping[str, int]) -> _Rule | None:
    """Return a rule with its scale if it computes what a region computes on probe inputs; None if it does not."""
    inputs = {one.value.name or "": (_FLOAT, len(one.sizes) + 1) for one in region.sources}
    written, start = _in_float32(region, inputs, opsets), {"start": (_FLOAT, len(rule.state_sizes()))}
    try:
        original = open_session(written)
        scan = open_session(build_model([rule.node(region)], outputs=["rows"], opsets=opsets, inputs=inputs | start))
        for seed, magnitude in enumerate(_DECAYS):
            feeds = _probe(rule, region, magnitude, seed)
            (expected,) = original.run(None, feeds)
            (found,) = scan.run(None, {**feeds, "start": np.zeros(rule.state_sizes(), np.float32)})
            if seed == 0:
                rule = replace(rule, scale=float((found * expected).sum() / (found * found).sum()))
            if not _is_near(expected, rule.scale * found, region.axis):
                return None
    except Exception:  # whatever onnxruntime raises
        return None
    return rule


def _in_float32(region: Region, inputs: Mapping[str, InputType], opsets: Mapping[str, int]) -> onnx.ModelProto:
    """Return a model that computes a region in float32, so that rounding to 16 bits hides no difference."""
    nodes = [ir.serde.serialize_node(node) for node in region.nodes]
    for node in nodes:
        use_float32(node, NARROW)
    tensors = {
        value.name: ir.Tensor(tensor.numpy().astype(np.float32)) if tensor.dtype in NARROW else tensor
        for value, tensor in region.constants.items()
    }
    constants = [initializer(name, tensor) for name, tensor in tensors.items()]
    return build_model(nodes, outputs=[region.result.name], opsets=opsets, inputs=inputs, initializers=constants)


def _probe(rule: _Rule, region: Region, magnitude: float, seed: int) -> dict[str, np.ndarray]:
    """Return probe inputs: keys of length one, as the rule is not stable for longer ones, and decays below zero."""
    draw, feeds = np.random.default_rng(seed), {}
    for name, one in rule.operands.items():
        sizes = [*one.sizes[: one.axis], region.tokens, *one.sizes[one.axis :]]
        array = draw.standard_normal(sizes)
        if name == "k":
            array /= np.linalg.norm(array, axis=-1, keepdims=True)
        elif name == "g":
            array = -magnitude * np.abs(array)
        elif name == "b":
            array = draw.uniform(0.1, 0.9, sizes)
        feeds[one.value.name or ""] = array.astype(np.float32)
    return feeds


def _is_near(expected: np.ndarray, found: np.ndarray, axis: int) -> bool:
    """Return whether arrays are equal up to sums in another order, each token by its own numbers."""
    axes = tuple(place for place in range(expected.ndim) if place != axis)
    gap, size = np.abs(expected - found).max(axes), np.abs(expected).max(axes)
    return bool(np.isfinite(expected).all() and (gap <= _CLOSE * size).all() and size.all())


def _text(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
