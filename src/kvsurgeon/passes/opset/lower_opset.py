"""Convert a model to an earlier opset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.opset import versions
from kvsurgeon.passes.opset.later_operators import definition
from kvsurgeon.passes.options import check_count

Schema = onnx.defs.OpSchema


@dataclass(frozen=True, kw_only=True)
class LowerOpset:
    """Convert a model to an earlier opset, for runtimes that support no later one.

    Before: nodes of the exported opset. After: the same nodes in the earlier version of their operators, and the IR
    version of that opset. Imports of unused domains are removed. Constant inputs that were attributes are converted.
    `LayerNormalization` and `Gelu` of the main graph are decomposed if the earlier opset lacks them.

    Not handled: other operators, types and attributes that the earlier opset lacks, models with functions.

    Attributes:
        opset: Opset version to convert to.
    """

    name: ClassVar[str] = "lower-opset"

    opset: int = 17

    def __post_init__(self) -> None:
        check_count("opset", self.opset, most=versions.NEWEST)

    def apply(self, subject: Subject) -> Outcome:
        """Lower the opset of `subject.model`.

        Raises:
            UnsupportedError: A node has no equivalent in the earlier opset; the model is unchanged.
        """
        model = subject.model
        declared = versions.declared_opset(model)
        if declared <= self.opset:
            return self._lower_ir_version(model, declared)
        versions.check_convertible(model, self.opset, "lowered")
        nodes = versions.standard_nodes(model)
        later = _definitions(model, nodes, declared, self.opset)
        changes = {node: _attribute_changes(node, declared, self.opset) for node in nodes if node not in later}
        model.graph.opset_imports[""] = self.opset
        editor = Editor(model)
        for node, attributes in changes.items():
            if attributes is not None:
                _convert(editor, node, versions.schema(node, self.opset), attributes)
        for node, build in later.items():
            op = NodeBuilder(editor, node.outputs[0].name or node.op_type, like=node)
            _replace(editor, node.outputs[0], build(op))
        editor.finish()
        self._lower_ir_version(model, declared)
        return Changed(edits=editor.edits + 1)

    def _lower_ir_version(self, model: ir.Model, declared: int) -> Outcome:
        """Lower the IR version to that of the opset and remove imports of unused domains."""
        known = versions.ir_version(self.opset)
        used = {node.domain for node in model.graph.all_nodes()} | {""}
        unused = [] if model.functions else [domain for domain in model.graph.opset_imports if domain not in used]
        if model.ir_version <= known and not unused:
            return Unchanged(reason=f"the model has opset {declared}")
        for domain in unused:
            del model.graph.opset_imports[domain]
        model.ir_version = min(model.ir_version, known)
        return Changed(edits=1 + len(unused))


def _definitions(
    model: ir.Model, nodes: Sequence[ir.Node], new: int, old: int
) -> Mapping[ir.Node, Callable[[NodeBuilder], ir.Value]]:
    """Return what builds the nodes of the main graph whose operator the earlier opset lacks but can define."""
    missing = [node for node in nodes if versions.schema(node, new) and not versions.schema(node, old)]
    if not missing:
        return {}
    with deep_recursion():
        shapes = shapes_of(model.graph)
    found = {}
    for node in missing:
        source = node.inputs[0] if node.inputs and node.graph is model.graph else None
        define = None if source is None else definition(node, shapes[source])
        if source is not None and define is not None:
            found[node] = partial(define, node, shapes[source])
    return found


def _replace(editor: Editor, output: ir.Value, result: ir.Value) -> None:
    result.type, result.shape = output.type, output.shape
    editor.replace(output, result)


def _attribute_changes(node: ir.Node, new: int, old: int) -> dict[str, Any] | None:
    """Return the attributes to set, or to remove if None, in the earlier version; None if the versions are equal.

    Raises:
        UnsupportedError: The node has no equivalent in the earlier opset.
    """
    after, before = versions.schema(node, new), versions.schema(node, old)
    if after is None:
        return None  # an operator of onnxruntime without a domain
    if before is None:
        raise _no_equivalent(node, old, "an operator of a later opset")
    if before.since_version == after.since_version:
        return None
    if versions.is_redefined(node):
        raise _no_equivalent(node, old, "an operator with another meaning")
    _check_types(node, before, old)
    changes: dict[str, Any] = {}
    for place in range(_input_count(node, before), len(node.inputs)):
        value, name = node.inputs[place], after.inputs[place].name
        if value is None:
            continue
        array = small_constant(value)
        if name not in before.attributes or array is None:
            raise _no_equivalent(node, old, f"input {name}, which is not a constant attribute")
        changes[name] = np.asarray(array).tolist()
    return dict.fromkeys(_removed_attributes(node, before, after, old)) | changes


def _input_count(node: ir.Node, schema: Schema) -> int:
    """Return how many inputs of a node a version of its operator has."""
    variadic = bool(schema.inputs) and schema.inputs[-1].option == Schema.FormalParameterOption.Variadic
    return len(node.inputs) if variadic else min(len(node.inputs), len(schema.inputs))


def _removed_attributes(node: ir.Node, before: Schema, after: Schema, old: int) -> list[str]:
    """Return the attributes that the earlier version lacks; their value must be what it computes without them."""
    removed = [name for name in node.attributes if name not in before.attributes]
    for name in removed:
        value = node.attributes[name].value
        if value != _default(after, name) and not (name == "num_outputs" and _is_even_split(node)):
            raise _no_equivalent(node, old, f"{name}={value}")
    return removed


def _default(schema: Schema, name: str) -> Any:
    default = schema.attributes[name].default_value if name in schema.attributes else None
    return onnx.helper.get_attribute_value(default) if default is not None and default.name else None


def _is_even_split(node: ir.Node) -> bool:
    """Return whether a `Split` may have outputs of equal size, which opset 17 requires of one without sizes."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    sizes = {value.shape[axis] for value in node.outputs if value.shape is not None}
    return node.op_type == "Split" and len([size for size in sizes if isinstance(size, int)]) <= 1


def _check_types(node: ir.Node, before: Schema, old: int) -> None:
    """Check that the earlier version supports the input types of a node.

    Raises:
        UnsupportedError: It does not.
    """
    allowed = {constraint.type_param_str: set(constraint.allowed_type_strs) for constraint in before.type_constraints}
    for formal, value in zip(before.inputs, node.inputs, strict=False):
        if value is None or value.dtype is None or formal.type_str not in allowed:
            continue
        type_name = f"tensor({value.dtype.name.lower()})"
        if type_name not in allowed[formal.type_str]:
            raise _no_equivalent(node, old, type_name)


def _convert(editor: Editor, node: ir.Node, schema: Schema | None, attributes: Mapping[str, Any]) -> None:
    """Remove inputs that the earlier version lacks, and set or remove attributes."""
    assert schema is not None
    count = _input_count(node, schema)
    for place in range(count, len(node.inputs)):
        editor.replace_input(node, place, None)
    node.resize_inputs(count)
    for name, value in attributes.items():
        if value is None:
            editor.remove_attribute(node, name)
        else:
            kind = ir.AttrInt64s if isinstance(value, list) else ir.AttrInt64
            node.attributes[name] = kind(name, value)


def _no_equivalent(node: ir.Node, old: int, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{node.op_type} has no equivalent in opset {old}", code=Code.OPSET, at=node.outputs[0].name, found=found,
        hint=f"export the model with opset {old}",
    )  # fmt: skip
