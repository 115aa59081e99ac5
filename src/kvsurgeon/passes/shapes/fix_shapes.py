"""Fix every shape to numbers, and compute what follows from them once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count
from kvsurgeon.passes.shapes.constant_folding import compute_constants, name_numbers
from kvsurgeon.passes.shapes.interface import Interface, read_interface
from kvsurgeon.passes.shapes.static_ranges import count_from_starts
from kvsurgeon.rewrite.cache_metadata import write_cache_metadata


@dataclass(frozen=True, kw_only=True)
class FixShapes:
    """Fix every shape to numbers: batch, tokens of a call, and tokens that a call can see at most.

    Before: `input_ids [batch_size, sequence_length]`, `past_key_values.{i}.key [batch_size, kv_heads, max_length,
    head_dim]`. After: `[1, 128]` and `[1, 3, 1024, 64]`; no dimension is a symbol, and no operator computes a shape.
    What a call is given in excess of its tokens counts as tokens of the future, so a host fills up its last chunk.
    Run on one model with several numbers of tokens, it gives files that share one file of weights.

    Not handled: a cache that grows, whose shape is another one in each call.

    Attributes:
        tokens: Tokens of a call.
        max_length: Tokens that a call can see at most, its own included. A model that has no cache needs none.
        batch_size: Sequences in a call.
    """

    name: ClassVar[str] = "fix-shapes"

    tokens: int
    max_length: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens)
        check_count("batch-size", self.batch_size)
        check_count("max-length", self.max_length, least=self.tokens)

    def apply(self, subject: Subject) -> Outcome:
        """Fix the shapes of `subject.model`.

        Raises:
            UnsupportedError: A size cannot be fixed; the model is left as it was.
        """
        model = simplify_model(subject.model)
        if model is subject.model:
            model = model.clone()
            model.meta.update(subject.model.meta)
        interface = read_interface(model, tokens=self.tokens, max_length=self.max_length, batch_size=self.batch_size)
        if interface.is_fixed:
            return Unchanged(reason="every input has a fixed shape")
        with deep_recursion():
            editor = Editor(model)
            interface.fix()
            _fix(model, editor)
            editor.finish()
            _write_shapes(model, interface)
        write_cache_metadata(model, interface.note)
        subject.model = model
        subject.changed()
        return Changed(edits=editor.edits)


def _fix(model: ir.Model, editor: Editor) -> None:
    """Name what is computed from shapes, count from where it is not, and compute the rest."""
    shapes = _shapes_of(model)
    name_numbers(model, editor, shapes)
    count_from_starts(model, editor, shapes)
    compute_constants(model, editor)


def _shapes_of(model: ir.Model) -> Shapes:
    graph = model.graph
    graph.sort()
    alive = find_live(graph)
    sizes = {
        value: tuple(size for size in value.shape or () if isinstance(size, int))
        for value in graph.inputs
        if not value.is_initializer()
    }
    nodes = [node for node in graph if node in alive]
    return infer_shapes(nodes, sizes, graph.opset_imports.get("", 1), named=True)


def _write_shapes(model: ir.Model, interface: Interface) -> None:
    """Declare the shape of every value.

    Raises:
        UnsupportedError: One is no number.
    """
    shapes = _shapes_of(model)
    for node in model.graph:
        for value in node.outputs:
            fact = shapes.facts.get(value)
            if fact is None:
                continue
            if fact.shape is None or not all(isinstance(size, int) for size in fact.shape):
                raise UnsupportedError(
                    f"{node.op_type}: its result's size depends on more than shapes", at=value.name,
                    expected="numbers", found=str(None if fact.shape is None else list(fact.shape)),
                )  # fmt: skip
            value.shape = ir.Shape(fact.shape)
            if value.type is None and fact.dtype is not None:
                value.type = ir.TensorType(fact.dtype)
