"""Editor: the only code that mutates a graph.

An editor adds nodes at the end of the graph, or before one node if `before` says so, with unique names. `finish`
removes dead code and sorts the nodes. Nodes are written in one of two ways:

    editor.node("Add", [x, y], name="sum", dtype=x.dtype)      # one node, every detail explicit
    op = NodeBuilder(editor, "attention")                      # many nodes: names and metadata are set once
    op.Add(x, op.Mul(y, op.number(2.0, x.dtype)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import find_live

DimNames = Sequence[int | str | None]


def check_free(graph: ir.Graph, names: Iterable[str]) -> None:
    """Check that no input or output of a graph has one of these names.

    Raises:
        UnsupportedError: One has.
    """
    taken = {value.name for value in (*graph.inputs, *graph.outputs)}
    for name in names:
        if name in taken:
            raise UnsupportedError(
                "the model already has an input or output of that name", code=Code.NAME_CONFLICT, at=name
            )


class Editor:
    """Add, replace and rewire nodes of the main graph of a model.

    Attributes:
        graph: The graph.
        opset: Its version of the standard operators.
        before: The node before which nodes are inserted; at the end of the graph if None.
        edits: Number of changes so far.
    """

    def __init__(self, model: ir.Model, *, before: ir.Node | None = None) -> None:
        self.graph = model.graph
        self.opset = model.graph.opset_imports.get("", 1)
        self.before = before
        self.edits = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._taken = {value.name for value in self._values()} | {node.name for node in self.graph}
        self._live = find_live(self.graph)
        self._added: set[ir.Value] = set()  # initializers
        self._originals: dict[ir.Node, ir.Node] = {}  # by copy

    def _values(self) -> Iterable[ir.Value]:
        yield from self.graph.inputs
        yield from self.graph.initializers.values()
        for node in self.graph:
            yield from node.outputs

    # Names

    def unique_name(self, name: str) -> str:
        """Return the name, with a number appended if the graph has it already."""
        unique, number = name, 1
        while unique in self._taken:
            unique, number = f"{name}_{number}", number + 1
        self._taken.add(unique)
        return unique

    def release_name(self, name: str) -> None:
        """Rename the inner value and the node that have a name, so that an input or output can take it."""
        if name not in self._taken:
            return
        for value in list(self._values()):
            if value.name == name and not value.is_graph_input() and not value.is_graph_output():
                initializer = value.is_initializer()
                if initializer:
                    self.graph.initializers.pop(name)
                value.name = self.unique_name(f"{name}_inner")
                if initializer:
                    self.graph.register_initializer(value)
                self.edits += 1
        for node in self.graph:
            if node.name == name:
                node.name = self.unique_name(f"{name}_node")
        self._taken.discard(name)

    def take_name(self, name: str) -> None:
        """Make a name free for a new input or output.

        Raises:
            UnsupportedError: An input or output has it.
        """
        check_free(self.graph, [name])
        self.release_name(name)

    # New values

    def constant(self, numbers: Any, dtype: Any = np.int64, name: str = "constant") -> ir.Value:
        """Return an initializer with this content; equal constants are added once."""
        array = np.array(numbers, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(ir.Tensor(array, name=self.unique_name(name)))
        return self._constants[key]

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a tensor as an initializer, under the name of the tensor."""
        shape, dtype = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=shape, type=dtype, const_value=tensor)
        self.graph.register_initializer(value)
        self._added.add(value)
        self.edits += 1
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str,
        dtype: ir.DataType | None = None,
        shape: DimNames | ir.Shape | None = None,
        like: ir.Node | None = None,
    ) -> ir.Value:
        """Add a node with one output, and return that.

        Args:
            operator: A standard operator.
            inputs: Its inputs.
            attributes: Its attributes; those that are None are left out.
            name: Name of the output, made unique.
            dtype: Element type of the output, if known.
            shape: Shape of the output, if known.
            like: A node whose metadata the new one takes.
        """
        value = ir.Value(
            name=self.unique_name(name),
            type=None if dtype is None else ir.TensorType(dtype),
            shape=None if shape is None else ir.Shape(shape),
        )
        self.operator("", operator, inputs, attributes or {}, [value], like)
        return value

    def operator(
        self,
        domain: str,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[ir.Value],
        like: ir.Node | None = None,
        name: str | None = None,
    ) -> ir.Node:
        """Add a node of any domain that computes these values, with the metadata of the node `like`."""
        name = self.unique_name(f"{outputs[0].name}/{operator}") if name is None else name
        built = ir.convenience.convert_attributes(attributes)
        metadata = {} if like is None else dict(like.metadata_props)
        return self.insert(
            ir.Node(domain, operator, inputs, built, outputs=outputs, name=name, metadata_props=metadata)
        )

    def insert(self, node: ir.Node) -> ir.Node:
        """Insert a node at the insertion point."""
        if node.domain:
            self.graph.opset_imports.setdefault(node.domain, 1)
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        self.edits += 1
        return node

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int, *, name: str) -> list[ir.Value]:
        """Split a value into parts of these sizes along an axis."""
        if len(sizes) == 1:
            return [value]
        parts = [ir.Value(name=self.unique_name(f"{name}_{index}"), type=value.type) for index in range(len(sizes))]
        in_attribute = self.opset < 13
        inputs = [value] if in_attribute else [value, self.constant(sizes, name="sizes")]
        attributes = {"axis": axis} | ({"split": sizes} if in_attribute else {})
        self.operator("", "Split", inputs, attributes, parts, name=self.unique_name(f"{name}/Split"))
        return parts

    def copy(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], suffix: str, without: frozenset[str] = frozenset()
    ) -> ir.Node:
        """Add a copy of a node with other inputs, and without some attributes.

        If `finish` removes the original as dead code, the copy takes over its names.
        """
        outputs = []
        for value in node.outputs:
            name = self.unique_name(f"{value.name}.{suffix}") if value.name else ""
            outputs.append(ir.Value(name=name, type=value.type))
        kept = [attribute for name, attribute in node.attributes.items() if name not in without]
        copy = ir.Node(
            node.domain, node.op_type, inputs, kept, overload=node.overload, outputs=outputs,
            name=self.unique_name(f"{node.name or node.outputs[0].name}.{suffix}"), doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        self._originals[copy] = node
        return self.insert(copy)

    # Changes

    def replace(self, value: ir.Value, by: ir.Value) -> None:
        """Replace a value by another one, which takes over its uses, its place as an output, and its name."""
        value.replace_all_uses_with(by, replace_graph_outputs=True)
        value.name, by.name = by.name, value.name
        self.edits += 1

    def replace_output(self, value: ir.Value, by: ir.Value) -> ir.Value:
        """Replace a value as an output of the graph, not its other uses; return the output, which has its name."""
        node = by.producer()
        if node is None or by.is_graph_output():
            by = self.node("Identity", [by], name=f"{value.name}.output", dtype=by.dtype, shape=by.shape)
        else:
            self._originals.pop(node, None)  # the name is that of the output, not of the copied value
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[index] = by
        value.name, by.name = by.name, value.name
        self.edits += 1
        return by

    def replace_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Replace an input of a node."""
        if node.inputs[index] is not value:
            node.replace_input_with(index, value)
            self.edits += 1

    def change_operator(self, node: ir.Node, operator: str) -> None:
        """Change a node to another standard operator, without attributes."""
        node.domain, node.op_type = "", operator
        node.attributes.clear()
        self.edits += 1

    def append_to(
        self,
        value: ir.Value,
        operator: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        shapes: tuple[DimNames, DimNames],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """Add a node that reads a value; its result takes over the uses of the value, its name and metadata.

        Args:
            value: The first input of the node.
            operator: The operator of the node.
            inputs: The other inputs of the node.
            dtype: Element type of the value and of the result.
            shapes: Shape of the value from now on, and of the result.
            attributes: Attributes of the node.
        """
        users, name = list(value.uses()), value.name or ""
        result = self.node(operator, [value, *inputs], attributes, name=name, dtype=dtype, shape=shapes[1])
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shapes[0])
        for user, index in users:
            self.replace_input(user, index, result)
        value.name, result.name = result.name, name
        producer, node = value.producer(), result.producer()
        if producer is not None and node is not None:
            node.metadata_props.update(producer.metadata_props)
        return result

    def set_attributes(self, node: ir.Node, attributes: Mapping[str, Any]) -> None:
        """Set attributes of a node."""
        node.attributes.update({one.name: one for one in ir.convenience.convert_attributes(attributes)})
        self.edits += 1

    def remove_attribute(self, node: ir.Node, name: str) -> None:
        """Remove an attribute, so that its default holds."""
        if node.attributes.pop(name, None) is not None:
            self.edits += 1

    def finish(self) -> None:
        """Remove dead code, give copies the names of removed originals, and sort the nodes."""
        live = find_live(self.graph)
        dead = [node for node in self.graph if node not in live]
        self.graph.remove(dead, safe=True)  # a removed node reads nothing
        self.edits += len(dead)
        self._rename_copies(live)
        for value in list(self.graph.initializers.values()):
            used = value in live or value.is_graph_output() or value.is_graph_input()
            if not used and (value in self._live or value in self._added):
                self.graph.initializers.pop(value.name or "")
        self.graph.sort()

    def _rename_copies(self, live: set[ir.Node | ir.Value]) -> None:
        renamed: set[ir.Node] = set()
        for copy, original in self._originals.items():
            if copy not in live or original in live or original in renamed:
                continue
            renamed.add(original)
            copy.name = original.name
            for mine, theirs in zip(copy.outputs, original.outputs, strict=True):
                mine.name, theirs.name = theirs.name, mine.name


class NodeBuilder:
    """Add nodes by calls: `op.Add(x, y)`, `op.Concat(x, y, axis=1)`, `op.Slice(x, op.int64([0]), op.int64([1]))`.

    A call adds a node of the standard operator of that name and returns its output, called `{prefix}.{operator}`.
    Attributes that are None are left out.

    Args:
        editor: Adds the nodes, at its insertion point.
        prefix: Start of every name.
        like: A node whose metadata the new nodes take.
    """

    def __init__(self, editor: Editor, prefix: str, *, like: ir.Node | None = None) -> None:
        self.editor = editor
        self.opset = editor.opset
        self._prefix = prefix
        self._like = like

    def __getattr__(self, operator: str) -> Callable[..., ir.Value]:
        if not operator[0].isupper():
            raise AttributeError(operator)
        return partial(self.add, operator)

    def add(self, operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node with one output, and return that."""
        plain = {name: int(value) if isinstance(value, ir.DataType) else value for name, value in attributes.items()}
        output = ir.Value(name=self._name(operator))
        self.editor.operator("", operator, inputs, plain, [output], self._like, name=output.name)
        return output

    def with_axes(self, operator: str, value: ir.Value, axes: Sequence[int], **attributes: Any) -> ir.Value:
        """Add a reduction, `Squeeze` or `Unsqueeze`, whose axes are an attribute or an input: the opset says."""
        if any(formal.name == "axes" for formal in onnx.defs.get_schema(operator, self.opset).inputs):
            return self.add(operator, value, self.int64(axes), **attributes)
        return self.add(operator, value, axes=axes, **attributes)

    def constant(self, array: np.ndarray) -> ir.Value:
        """Add a constant."""
        return self.editor.initializer(ir.Tensor(array, name=self._name("constant")))

    def int64(self, numbers: Sequence[int] | int) -> ir.Value:
        """Add an int64 constant: a scalar or a vector."""
        return self.constant(np.array(numbers, np.int64))

    def number(self, number: float, dtype: ir.DataType) -> ir.Value:
        """Add a scalar constant of an element type."""
        return self.constant(np.array(number, dtype.numpy()))

    def _name(self, operator: str) -> str:
        return self.editor.unique_name(f"{self._prefix}.{operator}")
