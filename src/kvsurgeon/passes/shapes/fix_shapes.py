"""Make all shapes static."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.cache.states import find_states
from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import find_live
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import check_count
from kvsurgeon.passes.shapes.constant_folding import fold_constants, fold_shapes
from kvsurgeon.passes.shapes.dimension_sizes import dimension_sizes, is_static, set_sizes
from kvsurgeon.passes.shapes.static_ranges import make_ranges_static
from kvsurgeon.rewrite.cache_metadata import read_cache_metadata, write_cache_metadata


@dataclass(frozen=True, kw_only=True)
class FixShapes:
    """Make all shapes static and fold the constants that follow.

    Before: `input_ids [batch_size, sequence_length]`, `past_key_values.{i}.key [batch_size, kv_heads, max_length,
    head_dim]`. After: `[1, 128]` and `[1, 3, 1024, 64]`; no dimension is symbolic, and no operator computes a shape.
    The last chunk of a text is padded on the right: causality masks the padding. Models with different numbers of
    tokens share one file of weights.

    Not handled: dynamic caches, whose shape differs between calls; several tokens in a call of a model that has states
    of fixed size, as of convolutions and linear recurrences, which take padding for tokens.

    Attributes:
        tokens: Tokens of a call.
        max_length: Maximum total sequence length; required for a model with a KV cache.
        batch_size: Batch size.
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
        """Make the shapes of `subject.model` static.

        Raises:
            UnsupportedError: A dimension has no fixed size, or padding would enter a state; the model is unchanged.
        """
        model = simplify_model(subject.model)
        if model is subject.model:
            model = copy_model(model)
        sizes = dimension_sizes(model, tokens=self.tokens, max_length=self.max_length, batch_size=self.batch_size)
        if is_static(model.graph):
            return Unchanged(reason="all inputs have a static shape")
        self._check_states(model.graph)
        metadata = read_cache_metadata(model)
        with deep_recursion():
            editor = Editor(model)
            set_sizes(model.graph, sizes)
            shapes = _infer(model)
            fold_shapes(model, editor, shapes)
            make_ranges_static(model, editor, shapes)
            fold_constants(model, editor)
            editor.finish()
            _write_shapes(model)
        write_cache_metadata(model, metadata)
        subject.model = model
        subject.changed()
        return Changed(edits=editor.edits)

    def _check_states(self, graph: ir.Graph) -> None:
        """Check that calls need no padding, or that no state would take it for tokens."""
        states = find_states(graph) if self.tokens > 1 else ()
        if states:
            raise UnsupportedError(
                "the padding of a chunk would enter a state, which no later call overwrites",
                code=Code.PASS_PRECONDITION, at=states[0].past.name, expected="tokens=1", found=f"tokens={self.tokens}",
            )  # fmt: skip


def _infer(model: ir.Model) -> Shapes:
    """Infer the shapes of all values from those of the inputs."""
    graph = model.graph
    graph.sort()
    live = find_live(graph)
    sizes = {
        value: tuple(size for size in value.shape or () if isinstance(size, int))
        for value in graph.inputs
        if not value.is_initializer()
    }
    nodes = [node for node in graph if node in live]
    return infer_shapes(nodes, sizes, graph.opset_imports.get("", 1), named=True)


def _write_shapes(model: ir.Model) -> None:
    """Declare the shape of every value.

    Raises:
        UnsupportedError: A shape is not static.
    """
    shapes = _infer(model)
    for node in model.graph:
        for value in node.outputs:
            fact = shapes.facts.get(value)
            if fact is None:
                continue
            if fact.shape is None or not all(isinstance(size, int) for size in fact.shape):
                raise UnsupportedError(
                    f"the output shape of {node.op_type} depends on the content of its inputs",
                    code=Code.PASS_PRECONDITION, at=value.name, expected="a static shape",
                    found=str(None if fact.shape is None else list(fact.shape)),
                )  # fmt: skip
            value.shape = ir.Shape(fact.shape)
            if value.type is None and fact.dtype is not None:
                value.type = ir.TensorType(fact.dtype)
