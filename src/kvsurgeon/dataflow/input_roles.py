"""What each input of a graph is given for: the new tokens, or all tokens so far. Told by its use, never by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.graph.query import find_live
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.symbolic.sequence_axes import Length

# Operators through which an input is still itself, position by position.
# fmt: off
_VIEWS = frozenset({
    "Cast", "CastLike", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand", "Tile", "Transpose", "Clip",
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Abs", "Slice", "Concat",
})
# fmt: on
_FORMED = frozenset({"Reshape", "Expand", "Tile", "Slice"})  # by a shape, which is their second input
_FORMS = _FORMED | {"Unsqueeze", "Squeeze"}
_WAVES = frozenset({"Sin", "Cos", "RotaryEmbedding", "MRotaryEmbedding"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum", "FusedMatMul"})
_ORDERED = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_FEWEST_PLACES = 16  # rows of a table of positions; types of tokens are fewer


@dataclass(frozen=True, kw_only=True)
class InputRole:
    """One graph input: its dimensions with the one length in them, and which length each sequence axis is given at."""

    value: ir.Value
    dimensions: tuple[Dimension, ...]
    lengths: dict[int, Length] = field(hash=False)
    holds_places: bool = False  # whole numbers that are compared with the places of tokens, and so are places too

    @property
    def is_token(self) -> bool:
        """Whether the input is given for the new tokens only."""
        return bool(self.lengths) and set(self.lengths.values()) == {Length.NEW}


def required_inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that a caller must feed: those that are not initializers as well."""
    return [value for value in graph.inputs if not value.is_initializer()]


def read_inputs(graph: ir.Graph) -> tuple[dict[ir.Value, tuple[Dimension, ...]], Dimension]:
    """Name the dimensions of the graph's inputs: batch, length, and whatever else they are.

    The length is the second axis of the first input of rank two or three (the first of rank one; the third where the
    second is fixed and the third is not), and every axis that the exporter called the same; inputs of the same rank
    agree axis by axis.

    Returns:
        The dimensions of each input, and the length: a symbol, or a number where the export fixed it.

    Raises:
        UnsupportedError: An input has no shape, has the batch twice, or none has a sequence axis.
    """
    names: dict[str, Dimension] = {}
    length: Dimension | None = None
    shaped = []
    for value in required_inputs(graph):
        if value.shape is None:
            raise UnsupportedError(
                "an input has no shape", at=value.name, expected="a shape with a batch and a sequence axis",
                hint="give the input a shape, symbolic or not",
            )  # fmt: skip
        shaped.append(value)
        if length is None and 1 <= len(value.shape) <= 3:
            axis = _length_axis(value.shape)
            length = value.shape[axis] if isinstance(value.shape[axis], int) else LENGTH
            _remember(names, value.shape[axis], length)
            if axis > 0:
                _remember(names, value.shape[0], BATCH)
    if length is None:
        raise UnsupportedError("no input has a sequence axis", expected="an input such as input_ids [batch, sequence]")
    return {value: _dimensions(value, names, length) for value in shaped}, length


def shapes_of(graph: ir.Graph) -> Shapes:
    """Return what is known of every value that an output depends on, with the names that inputs give to dimensions.

    Raises:
        UnsupportedError: An input has no shape, has the batch twice, or none has a sequence axis.
    """
    alive = find_live(graph)
    dimensions, _ = read_inputs(graph)
    nodes = [node for node in graph if node in alive]
    return infer_shapes(nodes, dimensions, graph.opset_imports.get("", 1), named=True)


def _length_axis(shape: ir.Shape) -> int:
    """Behind the batch, where there is one; several rows of numbers for each token may stand between."""
    stacked = len(shape) == 3 and isinstance(shape[1], int) and not isinstance(shape[2], int)
    return 2 if stacked else min(1, len(shape) - 1)


def _remember(names: dict[str, Dimension], size: int | ir.SymbolicDim, dimension: Dimension) -> None:
    if not isinstance(size, int) and size.value is not None:
        names.setdefault(str(size.value), dimension)


def _dimensions(value: ir.Value, names: dict[str, Dimension], length: Dimension) -> tuple[Dimension, ...]:
    shape = value.shape or ()
    rank = len(shape)
    usual = {1: {0: length}, 2: {0: BATCH, 1: length}, 3: {0: BATCH, 1: length}, 4: {0: BATCH, 2: length, 3: length}}
    result: list[Dimension] = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            result.append(size)
            continue
        named = names.get(str(size.value)) if size.value is not None else None
        expected = usual.get(rank, {}).get(axis)
        if named is None:
            named = expected if expected is not None else dim.symbol(f"{value.name}.{axis}")
            _remember(names, size, named)
        result.append(named)
    if result.count(BATCH) > 1:  # a size that is not told apart would be believed wherever the graph reads it
        raise UnsupportedError(
            "an input calls two axes by the name of the batch", at=value.name, found=str(shape),
            expected="another name for each size", hint="name its dimensions anew",
        )  # fmt: skip
    return tuple(result)


def classify_inputs(
    graph: ir.Graph, dimensions: dict[ir.Value, tuple[Dimension, ...]], length: Dimension
) -> list[InputRole]:
    """Tell which inputs are given for the new tokens and which for all tokens so far, by what they are used for.

    What indexes a table, becomes an angle or enters a product with weights position by position is given for the new
    tokens (`input_ids`, `inputs_embeds`, `position_ids`, `token_type_ids`); the rest are masks.
    """
    found = []
    for value, sizes in dimensions.items():
        axes = [
            axis for axis, size in enumerate(sizes) if size is length or (isinstance(length, int) and size == length)
        ]
        if len(axes) > 1 and len(sizes) == 2 and isinstance(length, int):
            axes = axes[-1:]
        if len(sizes) == 3 and len(axes) == 2 and isinstance(length, int) and sizes[2] == length:
            axes = axes[:1]  # [batch, length, hidden] with hidden == length
        if len(axes) >= 2:  # a mask of queries against keys
            lengths = {axes[-2]: Length.NEW, axes[-1]: Length.TOTAL}
        elif not axes:
            lengths = {}
        else:
            lengths = {axes[0]: Length.NEW if is_given_for_new_tokens(value) else Length.TOTAL}
        places = len(axes) == 1 and _is_compared_with_places(value)
        found.append(InputRole(value=value, dimensions=sizes, lengths=lengths, holds_places=places))
    if not any(given.is_token for given in found):
        alone = [given for given in found if len(given.lengths) == 1]
        if len(alone) != 1:
            raise UnsupportedError(
                "no input is given for the new tokens only",
                expected="an input that indexes an embedding table, or embeddings [batch, sequence, hidden]",
                found=", ".join(str(given.value.name) for given in found) or "no inputs",
            )
        found[found.index(alone[0])] = InputRole(
            value=alone[0].value, dimensions=alone[0].dimensions, lengths=dict.fromkeys(alone[0].lengths, Length.NEW)
        )
    return found


def is_given_for_new_tokens(value: ir.Value) -> bool:
    """Whether an input with one sequence axis is given for the new tokens, and not for all so far, by its use."""
    if len(value.shape or ()) == 3 and value.dtype is not None and value.dtype.is_floating_point():
        return True
    return _is_compared_with_places(value) or any(_tells_tokens(node, index) for node, index in _readers(value))


def _tells_tokens(node: ir.Node, index: int) -> bool:
    """Whether what a node reads there indexes a table, becomes an angle, or is looked for in a vocabulary."""
    if node.op_type == "OneHot" or _becomes_angles(node, index) or _rows_picked(node, index):
        return True
    return node.op_type == "Equal" and _is_vocabulary(node.inputs[1 - index])


def _becomes_angles(node: ir.Node, index: int) -> bool:
    """Whether what a node reads there is multiplied with frequencies; a mask may be multiplied with itself."""
    others = [other for place, other in enumerate(node.inputs) if place != index and other is not None]
    return node.op_type in _WAVES or (node.op_type in _PRODUCTS and not any(_reads_input(other) for other in others))


def find_positions(inputs: Iterable[InputRole]) -> list[InputRole]:
    """Return the inputs that say where each new token stands: they become angles, or pick a row for each place.

    The first input of new tokens holds the text. What picks from fewer rows than a text has tokens is a type of token.
    """
    whole = [given for given in inputs if given.is_token and len(given.dimensions) <= 2]
    numbers = [given for given in whole[1:] if given.value.dtype in (ir.DataType.INT64, ir.DataType.INT32)]
    return [
        given for given in numbers if given.holds_places or any(_places(*reader) for reader in _readers(given.value))
    ]


def _places(node: ir.Node, index: int) -> bool:
    return _becomes_angles(node, index) or _rows_picked(node, index) >= _FEWEST_PLACES


def _rows_picked(node: ir.Node, index: int) -> int:
    """How many rows the table has that a node picks from by this input; 0 if it picks none."""
    if not has_trait(node, Trait.LOOKUP) or index != 1:
        return 0
    return _table_rows(node.inputs[0])


def _is_compared_with_places(value: ir.Value) -> bool:
    """Whether whole numbers are held against 0, 1, 2, ..., by their order: keys no later than a query's place."""
    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return False
    return any(
        node.op_type in _ORDERED and index < 2 and _counts_up(node.inputs[1 - index]) for node, index in _readers(value)
    )


def _counts_up(value: ir.Value | None) -> bool:
    """Whether a value is a range in another form."""
    for _ in range(8):
        node = None if value is None else value.producer()
        if node is None or node.op_type == "Range" or node.op_type not in _VIEWS:
            return node is not None and node.op_type == "Range"
        value = node.inputs[0]
    return False


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield what reads an input while it is still itself, position by position."""
    seen, pending = {value}, [value]
    while pending:
        for node, index in pending.pop().uses():
            yield node, index
            if not _keeps_itself(node, index, seen):
                continue
            fresh = [result for result in node.outputs if result not in seen]
            seen.update(fresh)
            pending += fresh


def _keeps_itself(node: ir.Node, index: int, seen: Collection[ir.Value]) -> bool:
    """Whether the result of a node is what it reads there, in another form or moved by constants."""
    if node.op_type in ("Gather", "Split"):
        return index == 0 and all(constant_tensor(other) is not None for other in node.inputs[1:])
    if node.op_type not in _VIEWS or (index > 0 and node.op_type in _FORMED):
        return False
    others = [
        other for other in node.inputs if other is not None and other not in seen and not _tells_sign(other, seen)
    ]
    return node.op_type in _FORMS or not any(_reads_input(other) for other in others)


def _tells_sign(value: ir.Value, seen: Collection[ir.Value]) -> bool:
    """Whether a value is 0 or 1 by what an input is against a constant: ids below 0 count from the end of a table."""
    node = _without(("Cast", "Not"), value).producer()
    if node is None or node.op_type not in _ORDERED or node.inputs[0] is None:
        return False
    return constant_tensor(node.inputs[1]) is not None and _without(("Cast",), node.inputs[0]) in seen


def _without(operators: Collection[str], value: ir.Value) -> ir.Value:
    """What a value was before operators of one input."""
    node = value.producer()
    while node is not None and node.op_type in operators and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_vocabulary(value: ir.Value | None) -> bool:
    """Whether a value lists 0, 1, 2, ..., each of which is looked for in what is compared with it."""
    numbers = small_constant(value)
    if numbers is None or numbers.dtype.kind not in "iu" or numbers.size < 3:
        return False
    return bool((numbers.reshape(-1) == range(numbers.size)).all()) and numbers.shape[-1] == numbers.size


def _reads_input(value: ir.Value) -> bool:
    """Whether what is in a value, and not only its shape, comes from an input of the graph."""
    seen, pending = {value}, [value]
    while pending:
        current = pending.pop()
        node = current.producer()
        if node is None:
            if current.is_graph_input() and constant_tensor(current) is None:
                return True
            continue
        if node.op_type not in SHAPE_ONLY:
            fresh = [source for source in node.inputs if source is not None and source not in seen]
            seen.update(fresh)
            pending += fresh
    return False


def _table_rows(value: ir.Value | None) -> int:
    """Rows of a floating-point table, possibly cast, dequantised or repeated for the batch; 0 if it is none.

    Of what is computed of tables and lengths alone, there are as many as places.
    """
    made = value
    for _ in range(6):
        tensor = constant_tensor(value)
        if tensor is not None:
            sizes = [size for size in tensor.shape if isinstance(size, int)]
            return max(sizes[:-1], default=0)
        node = None if value is None else value.producer()
        if node is None or node.op_type not in {"Cast", "DequantizeLinear", "Identity", "Transpose", *_FORMS}:
            break
        value = node.inputs[0]
    return _FEWEST_PLACES if made is not None and _is_computed_rows(made) else 0


def _is_computed_rows(value: ir.Value) -> bool:
    rows = value.shape is None or len(value.shape) >= 2
    return rows and value.producer() is not None and not _reads_input(value)
