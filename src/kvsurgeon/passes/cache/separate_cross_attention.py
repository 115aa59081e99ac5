"""Compute the keys and values of cross-attention once, in a second model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention.cross_attention import FixedOperand
from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor, check_free
from kvsurgeon.graph.query import downstream, find_live, upstream
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.passes.contract import Changed, Companion, Outcome, Subject, Unchanged
from kvsurgeon.resizing.lengths import LengthValues, sources_of
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import BATCH, Dimension
from kvsurgeon.symbolic.fact import Fact

FILE = "cross_attention.onnx"


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """Keys or values of one layer of cross-attention."""

    operand: FixedOperand
    past: str
    present: str
    dtype: ir.DataType
    shape: ir.Shape  # [batch, heads, keys, head_dim]

    @property
    def is_moved(self) -> bool:
        """Whether the axes of the tensor have another order."""
        return self.operand.order != (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class SeparateCrossAttention:
    """Compute the keys and values of cross-attention in a second model, once for each encoder output.

    Before: `encoder_hidden_states [batch, encoder_length, hidden]` is projected in every call. After: the inputs
    `past_key_values.{i}.encoder.key|value [batch, heads, encoder_length, head_dim]` take its place, and
    `cross_attention.onnx` next to the model computes them from it, as `present.{i}.encoder.key|value`.

    Not handled: keys without an axis of heads.

    Attributes:
        past: Name template of the inputs; {kind} is "key" or "value".
        present: Name template of the outputs of the second model.
    """

    name: ClassVar[str] = "separate-cross-attention"

    past: str = "past_key_values.{layer}.encoder.{kind}"
    present: str = "present.{layer}.encoder.{kind}"

    def apply(self, subject: Subject) -> Outcome:
        """Replace keys and values of cross-attention in `subject.model` by inputs.

        Raises:
            UnsupportedError: The model is no decoder, or keys have no axis of heads; it is unchanged.
            UsageError: A name template does not give unique names.
        """
        with deep_recursion():
            analysis = subject.analysis()
            tensors = list(self._tensors(analysis))
            if not tensors:
                return Unchanged(reason="no keys of cross-attention are computed from an input")
            _check_names(analysis.model.graph, tensors)
            subject.changed()  # the analysis refers to the graph that is edited below
            companion = _companion(analysis, copy_model(analysis.model), tensors)
            edits = _replace_by_inputs(analysis, tensors)
        subject.model = analysis.model
        return Changed(edits=edits, companions={FILE: companion})

    def _tensors(self, analysis: Analysis) -> Iterator[_Tensor]:
        for layer, site in enumerate(analysis.cross_attentions):
            kinds: tuple[tuple[Literal["key", "value"], FixedOperand | None], ...]
            kinds = (("key", site.key), ("value", site.value))
            for kind, operand in kinds:
                if operand is None:
                    raise UnsupportedError(
                        "the keys and values of a cross-attention have no axis of heads", code=Code.NO_CACHE_POINT,
                        at=site.output.name, expected="a tensor [batch, heads, keys, head_dim]",
                    )  # fmt: skip
                if operand.value.is_graph_input():
                    continue
                sizes: tuple[Dimension, ...] = (analysis.flow.batch, operand.heads, site.key_length, operand.head_dim)
                shape = ir.Shape(dim_names(sizes))
                names = [template.format(layer=layer, kind=kind) for template in (self.past, self.present)]
                dtype = analysis.shapes[operand.value].dtype or ir.DataType.FLOAT
                yield _Tensor(operand=operand, past=names[0], present=names[1], dtype=dtype, shape=shape)


def _name_batch(graph: ir.Graph, sizes: Mapping[str | None, Sequence[Dimension]]) -> None:
    """Give the batch its standard name in all inputs and outputs, so that both models have the same."""
    before = {
        declared
        for value in graph.inputs
        for declared, size in zip(value.shape or (), sizes.get(value.name, ()), strict=False)
        if size is BATCH
    }
    (name,) = dim_names([BATCH])
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([name if declared in before else declared for declared in value.shape])


def _check_names(graph: ir.Graph, tensors: list[_Tensor]) -> None:
    names = [name for tensor in tensors for name in (tensor.past, tensor.present)]
    if len(set(names)) < len(names):
        raise UsageError("expected names that contain {layer} and {kind}, so that each is unique")
    check_free(graph, names)


def _companion(analysis: Analysis, model: ir.Model, tensors: list[_Tensor]) -> Companion:
    """Return the model that computes the tensors, made of a copy of the analyzed model."""
    graph, editor = model.graph, Editor(model)
    facts = {value.name: analysis.shapes[value] for node in analysis.flow.order for value in node.outputs}
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    for tensor in tensors:
        value = values[tensor.operand.value.name]
        operator, attributes = ("Transpose", {"perm": tensor.operand.order}) if tensor.is_moved else ("Identity", {})
        editor.release_name(tensor.present)
        output = editor.node(operator, [value], attributes, name="cross", dtype=tensor.dtype)
        output.name, output.shape = tensor.present, tensor.shape
        graph.outputs.append(output)
    sizes = {given.value.name: given.dimensions for given in analysis.inputs}
    _name_batch(graph, sizes)
    _read_sizes_elsewhere(editor, facts, {value: sizes[value.name] for value in graph.inputs if value.name in sizes})
    return Companion(model=model, connections={tensor.present: tensor.past for tensor in tensors})


def _replace_by_inputs(analysis: Analysis, tensors: list[_Tensor]) -> int:
    """Replace the tensors by inputs, and return the number of edits."""
    graph, editor = analysis.model.graph, Editor(analysis.model)
    facts = {value.name: analysis.shapes[value] for node in analysis.flow.order for value in node.outputs}
    sizes = {given.value: given.dimensions for given in analysis.inputs}
    _name_batch(graph, {value.name: size for value, size in sizes.items()})
    for tensor in tensors:
        value: ir.Value = tensor.operand.value
        editor.release_name(tensor.past)
        given = ir.Value(name=tensor.past, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        graph.inputs.append(given)
        before = analysis.shapes[value].shape or ()
        sizes[given] = tuple(before[axis] for axis in tensor.operand.order)
        if tensor.is_moved:
            back = np.argsort(tensor.operand.order).tolist()
            given = editor.node("Transpose", [given], {"perm": back}, name=f"{tensor.past}.axes", dtype=tensor.dtype)
        for node, index in list(value.uses()):
            editor.replace_input(node, index, given)
    _read_sizes_elsewhere(editor, facts, sizes)
    return editor.edits


def _read_sizes_elsewhere(
    editor: Editor, facts: Mapping[str | None, Fact], sizes: Mapping[ir.Value, Sequence[Dimension]]
) -> None:
    """Remove the inputs of which nothing but sizes is read; the sizes are read from other inputs.

    Args:
        editor: The editor of the graph.
        facts: What is known of each value, by name.
        sizes: The dimensions of each input.
    """
    graph = editor.graph
    read = set(upstream(graph.outputs, inputs=content_inputs))
    unread = [value for value in graph.inputs if value not in read]
    lengths = LengthValues(editor, sources_of({value: size for value, size in sizes.items() if value in read}))
    for value in list(downstream(unread)):
        node = value.producer()
        numbers = facts[value.name].value if value.name in facts else None
        if node is None or numbers is None or not _are_known(numbers, lengths):
            continue
        made = lengths.typed(lengths.array(numbers), facts[value.name].dtype)
        for user, index in list(value.uses()):
            editor.replace_input(user, index, made)
    editor.finish()
    live = find_live(graph)
    for value in unread:
        if value not in live:
            graph.inputs.remove(value)


def _are_known(numbers: np.ndarray, lengths: LengthValues) -> bool:
    """Return whether numbers are computed from sizes of inputs that are there."""
    symbols = {symbol for number in numbers.reshape(-1) for symbol in getattr(number, "free_symbols", ())}
    return symbols <= lengths.sources.keys()
