"""The one pair of hands: every change to a graph goes through here, named, counted and kept in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.liveness import find_alive

DimNames = Sequence[int | str | None]


class Editor:
    """Add and rewire nodes of a graph; `finish` drops what nobody can see and restores the order."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.opset = model.graph.opset_imports.get("", 1)
        self.edits = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._taken = {value.name for value in self._values()} | {node.name for node in self.graph}
        self._alive = find_alive(self.graph)
        self._twins: dict[ir.Node, ir.Node] = {}

    def _values(self) -> Iterable[ir.Value]:
        yield from self.graph.inputs
        yield from self.graph.initializers.values()
        for node in self.graph:
            yield from node.outputs

    def name(self, wish: str) -> str:
        """Return a name that nothing in the graph has, as close to the wish as can be."""
        name, number = wish, 1
        while name in self._taken:
            name, number = f"{wish}_{number}", number + 1
        self._taken.add(name)
        return name

    def free(self, name: str) -> None:
        """Make a name available: whatever inside the graph has it is called otherwise from now on."""
        if name not in self._taken:
            return
        for value in list(self._values()):
            if value.name == name and not value.is_graph_input() and not value.is_graph_output():
                initializer = value.is_initializer()
                if initializer:
                    self.graph.initializers.pop(name)
                value.name = self.name(f"{name}_inner")
                if initializer:
                    self.graph.register_initializer(value)
                self.edits += 1
        for node in self.graph:
            if node.name == name:
                node.name = self.name(f"{name}_node")
        self._taken.discard(name)

    def constant(self, numbers: Any, dtype: Any = np.int64, wish: str = "constant") -> ir.Value:
        """Return an initializer that holds these numbers; the same numbers are kept once."""
        array = np.array(numbers, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.Tensor(array, name=self.name(wish))
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
            self._constants[key] = value
            self.edits += 1
        return self._constants[key]

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        wish: str,
        dtype: ir.DataType | None = None,
        shape: DimNames | None = None,
    ) -> ir.Value:
        """Add a node and return its output, called as close to `wish` as can be."""
        name = self.name(wish)
        value = ir.Value(
            name=name,
            type=None if dtype is None else ir.TensorType(dtype),
            shape=None if shape is None else ir.Shape(shape),
        )
        built = ir.convenience.convert_attributes(attributes or {})
        self.graph.append(ir.Node("", operator, inputs, built, outputs=[value], name=self.name(f"{name}/{operator}")))
        self.edits += 1
        return value

    def operator(
        self,
        domain: str,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[ir.Value],
        like: ir.Node | None = None,
    ) -> ir.Node:
        """Add a node of any domain that makes these values; metadata is that of the node which it is like."""
        built = ir.convenience.convert_attributes(attributes)
        metadata = {} if like is None else dict(like.metadata_props)
        name = self.name(f"{outputs[0].name}/{operator}")
        node = ir.Node(domain, operator, inputs, built, outputs=outputs, name=name, metadata_props=metadata)
        self.graph.opset_imports.setdefault(domain, 1)
        self.graph.append(node)
        self.edits += 1
        return node

    def take_over(self, value: ir.Value, by: ir.Value) -> None:
        """Let whoever reads a value read another one, which takes over its name too."""
        value.replace_all_uses_with(by, replace_graph_outputs=True)
        value.name, by.name = by.name, value.name
        self.edits += 1

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int, *, wish: str) -> list[ir.Value]:
        """Cut a value into pieces of these sizes along an axis."""
        if len(sizes) == 1:
            return [value]
        pieces = [ir.Value(name=self.name(f"{wish}_{number}"), type=value.type) for number in range(len(sizes))]
        inputs, attributes = [value], [ir.AttrInt64("axis", axis)]
        if self.opset < 13:  # sizes have been an input since
            attributes.append(ir.AttrInt64s("split", sizes))
        else:
            inputs.append(self.constant(sizes, wish="sizes"))
        self.graph.append(ir.Node("", "Split", inputs, attributes, outputs=pieces, name=self.name(f"{wish}/Split")))
        self.edits += 1
        return pieces

    def twin(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], suffix: str, without: frozenset[str] = frozenset()
    ) -> ir.Node:
        """Add a node like another one with other inputs, and some attributes left out."""
        outputs = []
        for value in node.outputs:
            name = self.name(f"{value.name}.{suffix}") if value.name else ""
            outputs.append(ir.Value(name=name, type=value.type))
        kept = [attribute for name, attribute in node.attributes.items() if name not in without]
        twin = ir.Node(
            node.domain, node.op_type, inputs, kept, overload=node.overload, outputs=outputs,
            name=self.name(f"{node.name or node.outputs[0].name}.{suffix}"), doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )  # fmt: skip
        self.graph.append(twin)
        self._twins[twin] = node
        self.edits += 1
        return twin

    def rewire(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Let an input of a node read another value."""
        if node.inputs[index] is not value:
            node.replace_input_with(index, value)
            self.edits += 1

    def continue_with(
        self,
        value: ir.Value,
        operator: str,
        more: Sequence[ir.Value],
        dtype: ir.DataType,
        shapes: tuple[DimNames, DimNames],
    ) -> ir.Value:
        """Add a node that reads `value`; whoever read the value reads the result, which takes over name and metadata.

        Args:
            value: The value.
            operator: The node's operator.
            more: The node's other inputs.
            dtype: The type of both.
            shapes: What is true of the value from now on, and of the result.
        """
        users, name = list(value.uses()), value.name or ""
        result = self.node(operator, [value, *more], wish=name, dtype=dtype, shape=shapes[1])
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shapes[0])
        for user, index in users:
            self.rewire(user, index, result)
        value.name, result.name = result.name, name
        maker, node = value.producer(), result.producer()
        if maker is not None and node is not None:
            node.metadata_props.update(maker.metadata_props)
        return result

    def drop_attribute(self, node: ir.Node, name: str) -> None:
        """Leave an attribute to its default."""
        if node.attributes.pop(name, None) is not None:
            self.edits += 1

    def finish(self) -> None:
        """Drop what nobody can see or reads any more, give names back, and restore the order."""
        alive = find_alive(self.graph)
        for node in reversed(list(self.graph)):
            if node not in alive:
                self.graph.remove(node, safe=False)
                self.edits += 1
        self._give_names_back(alive)
        for value in list(self.graph.initializers.values()):
            used = value in alive or value.is_graph_output() or value.is_graph_input()
            if not used and (value in self._alive or value in self._constants.values()):
                self.graph.initializers.pop(value.name or "")
        self.graph.sort()

    def _give_names_back(self, alive: set[ir.Node | ir.Value]) -> None:
        """A twin that outlives its original takes over its names."""
        seen: set[ir.Node] = set()
        for twin, original in self._twins.items():
            if twin not in alive or original in alive or original in seen:
                continue
            seen.add(original)
            twin.name = original.name
            for mine, theirs in zip(twin.outputs, original.outputs, strict=True):
                mine.name, theirs.name = theirs.name, mine.name
