"""Write a model in an earlier version of ONNX's operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.opset.versions import (
    NEWEST,
    OTHERWISE,
    check_movable,
    declared_opset,
    ir_version,
    standard_nodes,
)
from kvsurgeon.passes.options import check_count


@dataclass(frozen=True, kw_only=True)
class LowerOpset:
    """Declare an earlier opset, for runtimes that read no later one.

    Before: nodes as an exporter wrote them. After: the same nodes, of the earlier versions of their operators, in the
    version of the format that came with that opset; domains of which there is no operator are declared no more. What
    an operator has as an input and had as an attribute is moved there, if it is a constant.

    Not handled: operators, types and options that came later; models that call functions of their own.

    Attributes:
        opset: The version to declare.
    """

    name: ClassVar[str] = "lower-opset"

    opset: int = 17

    def __post_init__(self) -> None:
        check_count("opset", self.opset, most=NEWEST)

    def apply(self, subject: Subject) -> Outcome:
        """Lower the opset of `subject.model`.

        Raises:
            UnsupportedError: A node cannot be written in that version; the model is left as it was.
        """
        model = subject.model
        declared = declared_opset(model)
        if declared <= self.opset:
            return self._format_lowered(model, declared)
        check_movable(model, self.opset, "lowered")
        rewritten = [(node, _rewritten(node, declared, self.opset)) for node in standard_nodes(model)]
        editor = Editor(model)
        for node, how in rewritten:
            if how is not None:
                _rewrite(editor, node, how)
        editor.finish()
        model.graph.opset_imports[""] = self.opset
        self._format_lowered(model, declared)
        return Changed(edits=editor.edits + 1)

    def _format_lowered(self, model: ir.Model, declared: int) -> Outcome:
        """Declare the first version of the format that knows the opset, and no operators that nothing uses.

        A runtime so old may know no later format, nor those operators in the version that is declared.
        """
        known = ir_version(self.opset)
        used = {node.domain for node in model.graph.all_nodes()} | {""}
        unused = [] if model.functions else [domain for domain in model.graph.opset_imports if domain not in used]
        if model.ir_version <= known and not unused:
            return Unchanged(reason=f"it is written in opset {declared}")
        for domain in unused:
            del model.graph.opset_imports[domain]
        model.ir_version = min(model.ir_version, known)
        return Changed(edits=1 + len(unused))


@dataclass(frozen=True, kw_only=True)
class _Rewritten:
    """How a node is written in the earlier version: fewer inputs, other attributes."""

    inputs: int
    moved: dict[str, Any]
    dropped: tuple[str, ...]


def _rewritten(node: ir.Node, new: int, old: int) -> _Rewritten | None:
    """Return how a node is written in the earlier version; None where it is written alike.

    Raises:
        UnsupportedError: The earlier version of the operator cannot say what the node says.
    """
    try:
        after = onnx.defs.get_schema(node.op_type, new, "")
    except onnx.defs.SchemaError:
        return None  # an operator of a runtime's own, written without its domain
    try:
        before = onnx.defs.get_schema(node.op_type, old, "")
    except onnx.defs.SchemaError:
        raise _cannot(node, old, "an operator that came later") from None
    if before.since_version == after.since_version:
        return None
    if node.op_type in OTHERWISE:
        raise _cannot(node, old, "another meaning")
    _check_types(node, before, old)
    extra = [(place, value) for place, value in enumerate(node.inputs) if _is_new(before, place)]
    moved = {after.inputs[place].name: _numbers(node, before, after.inputs[place].name, value, old)
             for place, value in extra if value is not None}  # fmt: skip
    return _Rewritten(
        inputs=len(node.inputs) - len(extra), moved=moved, dropped=tuple(_dropped(node, before, after, old))
    )


def _is_new(before: onnx.defs.OpSchema, place: int) -> bool:
    variadic = bool(before.inputs) and before.inputs[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    return place >= len(before.inputs) and not variadic


def _numbers(node: ir.Node, before: onnx.defs.OpSchema, name: str, value: ir.Value, old: int) -> Any:
    numbers = small_constant(value)
    if name not in before.attributes or numbers is None:
        raise _cannot(node, old, f"{name}, which is no constant attribute there")
    return np.asarray(numbers).tolist()


def _dropped(node: ir.Node, before: onnx.defs.OpSchema, after: onnx.defs.OpSchema, old: int) -> list[str]:
    """The attributes that came later, and say what was so before."""
    found = []
    for name, attribute in node.attributes.items():
        if name in before.attributes:
            continue
        usual = _default(after, name)
        parts = node.op_type == "Split" and name == "num_outputs" and _is_even(node)
        if attribute.value != usual and not parts:
            raise _cannot(node, old, f"{name}={attribute.value}")
        found.append(name)
    return found


def _default(schema: onnx.defs.OpSchema, name: str) -> Any:
    known = schema.attributes.get(name)
    return (
        None if known is None or not known.default_value.name else onnx.helper.get_attribute_value(known.default_value)
    )


def _is_even(node: ir.Node) -> bool:
    """Whether the parts of a `Split` may be of one size; before opset 18 one without sizes fails where they are not."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    sizes = {value.shape[axis] for value in node.outputs if value.shape is not None}
    return len([size for size in sizes if isinstance(size, int)]) <= 1


def _check_types(node: ir.Node, before: onnx.defs.OpSchema, old: int) -> None:
    allowed = {constraint.type_param_str: set(constraint.allowed_type_strs) for constraint in before.type_constraints}
    for formal, value in zip(before.inputs, node.inputs, strict=False):
        if value is None or value.dtype is None or formal.type_str not in allowed:
            continue
        dim_names = f"tensor({_SPELLED.get(value.dtype, value.dtype.name.lower())})"
        if dim_names not in allowed[formal.type_str]:
            raise _cannot(node, old, dim_names)


_SPELLED = {ir.DataType.DOUBLE: "double", ir.DataType.FLOAT: "float"}


def _rewrite(editor: Editor, node: ir.Node, how: _Rewritten) -> None:
    for place in range(how.inputs, len(node.inputs)):
        editor.replace_input(node, place, None)
    node.resize_inputs(how.inputs)
    for name in how.dropped:
        editor.remove_attribute(node, name)
    for name, numbers in how.moved.items():
        kind = ir.AttrInt64s if isinstance(numbers, list) else ir.AttrInt64
        node.attributes[name] = kind(name, numbers)


def _cannot(node: ir.Node, old: int, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{node.op_type} cannot be written in opset {old}", at=node.outputs[0].name, found=found,
        hint=f"export the model with opset {old}",
    )  # fmt: skip
