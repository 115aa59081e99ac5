"""The role of each graph input: given for the new tokens, or for all tokens so far. Its use decides, never its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import FIRST_CALL, GIVEN_FOR
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.graph.query import producers, through, upstream
from kvsurgeon.ops.content import depends_on_input
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Length

# Operators whose result is an input in another form, position by position.
_MOVES = (Trait.IDENTITY, Trait.RESHAPE, Trait.REPEAT, Trait.TRANSPOSE)
_FORMS = (*_MOVES, Trait.ARITHMETIC)
_ELEMENTWISE = (Trait.ELEMENTWISE, Trait.BROADCAST)
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_LARGEST_POSITION = 1 << 24
_STATED = {"new": Length.NEW, "total": Length.TOTAL, FIRST_CALL: Length.TOTAL}
_FEWEST_POSITIONS = 16  # rows of a table of positions; there are fewer token types


class MaskForm(Enum):
    """The numbers of a mask that hide a key."""

    KEPT = auto()  # 1 for a key that is attended to, 0 for a hidden one
    HIDDEN = auto()  # 0 for a key that is attended to, 1 for a hidden one
    ADDED = auto()  # added to scores: 0 for a key that is attended to, a large negative number for a hidden one


@dataclass(frozen=True, kw_only=True)
class InputRole:
    """The role of one graph input.

    Attributes:
        value: The input.
        dimensions: Its dimensions, in the symbols of the analysis.
        lengths: The length of each sequence axis.
        holds_positions: Whether it holds integers that are compared with positions, so that they are positions too.
        mask_form: If it is a mask, which of its numbers hide a key.
        number: If it has no tokens, a number that it may hold, at which masks hide as little as they can. If it opens a
            block, what it holds for tokens after the first call.
        opens_block: Whether it lets tokens of the first call attend to later ones of that call. If it has no tokens, it
            is at most the number of tokens of that call.
    """

    value: ir.Value
    dimensions: tuple[Dimension, ...]
    lengths: dict[int, Length] = field(hash=False)
    holds_positions: bool = False
    mask_form: MaskForm = MaskForm.KEPT
    number: float = 1.0
    opens_block: bool = False

    @property
    def is_token(self) -> bool:
        """Whether the input is given for the new tokens only."""
        return bool(self.lengths) and set(self.lengths.values()) == {Length.NEW}


def classify_inputs(dimensions: Mapping[ir.Value, tuple[Dimension, ...]], length: Dimension) -> list[InputRole]:
    """Return the role of each input, as its use decides.

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
        stated = value.metadata_props.get(GIVEN_FOR)
        _check_stated(value, stated, axes)
        if stated in _STATED:
            lengths = dict.fromkeys(axes, _STATED[stated])
        elif len(axes) >= 2:  # a mask of queries against keys
            lengths = {axes[-2]: Length.NEW, axes[-1]: Length.TOTAL}
        elif not axes:
            lengths = {}
        else:
            lengths = {axes[0]: Length.NEW if is_given_for_new_tokens(value) else Length.TOTAL}
        is_matrix = len(lengths) == 2 and value.dtype is not None and value.dtype.is_floating_point()
        found.append(
            InputRole(
                value=value, dimensions=sizes, lengths=lengths,
                holds_positions=stated != FIRST_CALL and len(axes) == 1 and _is_compared_with_positions(value),
                mask_form=MaskForm.ADDED if is_matrix else MaskForm.KEPT,
                number=0.0 if stated == FIRST_CALL else 1.0,
                opens_block=stated == FIRST_CALL,
            )
        )  # fmt: skip
    if not any(given.is_token for given in found):
        alone = [given for given in found if len(given.lengths) == 1]
        if len(alone) != 1:
            raise UnsupportedError(
                "no input is given for the new tokens only",
                expected="an input that indexes an embedding table, or embeddings [batch, sequence, hidden]",
                found=", ".join(str(given.value.name) for given in found) or "no inputs", code=Code.INPUT_ROLE,
            )  # fmt: skip
        found[found.index(alone[0])] = InputRole(
            value=alone[0].value, dimensions=alone[0].dimensions, lengths=dict.fromkeys(alone[0].lengths, Length.NEW)
        )
    if all(given.holds_positions for given in found if given.is_token):  # one of them holds the text
        found = [replace(given, holds_positions=False) for given in found]
    return found


def padding_mask(inputs: Sequence[InputRole]) -> ir.Value | None:
    """Return the only mask input if it is 1 at tokens and 0 at padding, `[batch, total_sequence]`; None otherwise.

    Its sum is the number of tokens of each sequence if padding comes last.
    """
    masks = [given for given in inputs if given.lengths and not given.is_token]
    if len(masks) != 1 or set(masks[0].lengths) != {1} or len(masks[0].dimensions) != 2:
        return None
    return masks[0].value if masks[0].mask_form is MaskForm.KEPT else None


def _check_stated(value: ir.Value, stated: str | None, axes: Collection[int]) -> None:
    """Check what the user states about an input, and that a number that may count the tokens of a call is stated.

    Raises:
        UnsupportedError: The graph says otherwise, or nothing is stated.
    """
    if stated == "fixed" and axes:
        raise UnsupportedError(
            "an input that is stated to be the same in every call is as long as the text", code=Code.INPUT_ROLE,
            at=value.name, found=str(value.shape), hint="the graph combines it with the tokens",
        )  # fmt: skip
    if stated in ("new", "total") and not axes:
        raise UnsupportedError(
            f"an input that is stated to be given for {stated} tokens has no axis of tokens", code=Code.INPUT_ROLE,
            at=value.name, found=str(value.shape),
        )  # fmt: skip
    is_number = value.shape is not None and all(size == 1 for size in value.shape)
    if stated is None and is_number and _is_compared_with_positions(value):
        raise UnsupportedError(
            "a number is compared with positions, and may count the tokens of a call", code=Code.INPUT_ROLE,
            at=value.name, expected="a mask, or positions", hint=f"--input {value.name}=fixed if it never changes",
        )  # fmt: skip


def is_given_for_new_tokens(value: ir.Value) -> bool:
    """Return whether an input with one sequence axis is given for the new tokens, not for all tokens so far."""
    if len(value.shape or ()) == 3 and value.dtype is not None and value.dtype.is_floating_point():
        return True
    if _is_compared_with_positions(value) or (value.dtype is not ir.DataType.BOOL and _holds_other_than_a_mask(value)):
        return True
    return any(_reads_tokens(node, index) for node, index in _readers(value))


def find_positions(inputs: Iterable[InputRole]) -> list[InputRole]:
    """Return the inputs that hold positions of the new tokens: angles are computed from them, or rows looked up.

    The first input of new tokens holds the text. An input that looks up fewer rows than a text has tokens holds token
    types.
    """
    tokens = [given for given in inputs if given.is_token and len(given.dimensions) <= 2]
    return [
        given
        for given in tokens[1:]
        if given.value.dtype in _INTEGERS
        and (given.holds_positions or any(_reads_positions(*reader) for reader in _readers(given.value)))
    ]


def _reads_tokens(node: ir.Node, index: int) -> bool:
    """Whether an input of a node indexes a table, is turned into angles, or is compared with a vocabulary."""
    if node.op_type == "OneHot" or _computes_angles(node, index) or _looked_up_rows(node, index):
        return True
    return node.op_type == "Equal" and _is_vocabulary(node.inputs[1 - index])


def _reads_positions(node: ir.Node, index: int) -> bool:
    return _computes_angles(node, index) or _looked_up_rows(node, index) >= _FEWEST_POSITIONS


def _computes_angles(node: ir.Node, index: int) -> bool:
    """Whether an input of a node is multiplied with frequencies; a mask may be multiplied with itself."""
    others = [other for place, other in enumerate(node.inputs) if place != index and other is not None]
    product = has_trait(node, Trait.PRODUCT) and not any(depends_on_input(other) for other in others)
    return has_trait(node, Trait.ROTARY) or product


def _looked_up_rows(node: ir.Node, index: int) -> int:
    """The number of rows of the table that an input of a node indexes; 0 if it indexes none."""
    return _table_rows(node.inputs[0]) if has_trait(node, Trait.LOOKUP) and index == 1 else 0


def _is_compared_with_positions(value: ir.Value) -> bool:
    """Whether integers are compared with 0, 1, 2, ... by order: keys up to the position of a query."""
    return value.dtype in _INTEGERS and any(
        has_trait(node, Trait.ORDER) and index < 2 and _counts_up(node.inputs[1 - index])
        for node, index in _readers(value)
    )


def _holds_other_than_a_mask(value: ir.Value) -> bool:
    """Whether numbers are compared with one that no mask holds, such as 300, or their extremum or mean is read.

    So are those from which such a number is subtracted, as a window before the last position, or of which one place is
    read. Whether all tokens are masked, or the first one, is a question about a mask.
    """
    for node, index in _readers(value):
        is_one_number = has_trait(node, Trait.EXTREMUM_OR_MEAN) or _selects_places(node)
        if is_one_number and index == 0 and not _is_truth(node.inputs[0], value) and not _gives_truth(node.outputs[0]):
            return True
        if not has_trait(node, Trait.LENGTH_SENSITIVE, Trait.ADD) or has_trait(node, Trait.SCALE):
            continue
        if _may_be_above_one(node, index):
            return True
        kinds = "iu" if has_trait(node, Trait.ADD) else "iuf"  # floats are added to scores to mask them
        others = [small_constant(other) for place, other in enumerate(node.inputs) if place != index]
        if any(other is not None and _exceeds_a_mask(other, kinds) for other in others):
            return True
    return False


def _selects_places(node: ir.Node) -> bool:
    """Whether a node selects a fixed number of places, or those from one on that is counted from the end."""
    if not has_trait(node, Trait.SELECT):
        return False
    if node.op_type != "Slice":
        return node.attributes.get_int("axis", 0) != 0 and small_constant(node.inputs[1]) is not None
    starts, ends, axes, steps = (small_constant(value) for value in (*node.inputs[1:5], None, None, None, None)[:4])
    if starts is None or (axes is not None and not axes.any()):
        return False
    if (steps is not None and (steps < 0).all()) or (ends is not None and (starts >= 0).all() and (ends < 0).all()):
        return False  # all places in reverse, or all but the last
    if starts.any() or ends is None:
        return bool((starts < 0).any() or (ends is not None and (ends < _LARGEST_POSITION).all()))
    return bool((ends < _sizes(node.inputs[0], range(ends.size) if axes is None else axes.reshape(-1))).all())


def _sizes(value: ir.Value | None, axes: Iterable[int]) -> np.ndarray:
    """Return the sizes of axes, if they are declared numbers; other sizes count as the largest length."""
    shape = [] if value is None or value.shape is None else list(value.shape)
    found = [shape[axis] if -len(shape) <= axis < len(shape) else None for axis in axes]
    return np.array([size if isinstance(size, int) else _LARGEST_POSITION for size in found])


def _is_truth(form: ir.Value | None, value: ir.Value) -> bool:
    """Whether another form of an input is made of truth values."""
    made = upstream([form], stop=lambda one: one is value)
    return any(node.attributes.get_int("to", 0) == ir.DataType.BOOL for node in producers(made))


def _gives_truth(value: ir.Value) -> bool:
    """Whether each reader of numbers casts them to truth values, or compares them with 0 or 1."""
    return not value.is_graph_output() and all(_asks_of_mask(node, index) for node, index in value.uses())


def _asks_of_mask(node: ir.Node, index: int) -> bool:
    if index == 0 and has_trait(node, *_MOVES):
        return node.attributes.get_int("to", 0) == ir.DataType.BOOL or _gives_truth(node.outputs[0])
    other = small_constant(node.inputs[1 - index]) if has_trait(node, Trait.ORDER) or node.op_type == "Equal" else None
    return other is not None and set(other.reshape(-1).tolist()) <= {0, 1}


def _may_be_above_one(node: ir.Node, index: int) -> bool:
    """Whether an input of a node is asked to be larger than 1, as no number of a mask is."""
    if (node.op_type, index) not in (("Greater", 0), ("Less", 1)):
        return False
    bound = small_constant(node.inputs[1 - index])
    return bound is not None and bound.size > 0 and bool((bound >= 1).all())


def _exceeds_a_mask(numbers: np.ndarray, kinds: str) -> bool:
    """Whether a number of these kinds of types is neither one of a mask, nor negative as a bias, nor without bound."""
    if numbers.dtype.kind not in kinds:
        return False
    sizes = numbers if numbers.dtype.kind == "f" else np.abs(numbers)
    return bool(((sizes > 1) & (sizes < _LARGEST_POSITION)).any())


def _counts_up(value: ir.Value | None) -> bool:
    """Whether a value is a range in another form."""
    source = None if value is None else through(value, lambda node: _is_form(node) or node.op_type == "Concat")
    node = None if source is None else source.producer()
    return node is not None and node.op_type == "Range"


def _is_form(node: ir.Node) -> bool:
    return has_trait(node, *_FORMS) or node.op_type == "Slice"


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the nodes that read an input or another form of it, with the index of their input."""
    forms, pending = {value}, [value]
    while pending:
        for node, index in pending.pop().uses():
            yield node, index
            if _is_still_the_input(node, index, forms):
                new = [result for result in node.outputs if result not in forms]
                forms.update(new)
                pending += new


def _is_still_the_input(node: ir.Node, index: int, forms: Collection[ir.Value]) -> bool:
    """Whether the result of a node is its input in another form, or changed by constants."""
    if has_trait(node, Trait.SELECT) and node.op_type != "Slice":
        return index == 0 and all(constant_tensor(other) is not None for other in node.inputs[1:])
    if has_trait(node, Trait.RESHAPE, Trait.REPEAT) or node.op_type == "Slice":
        return index == 0
    is_form = _is_form(node) or node.op_type == "Concat" or (node.op_type == "Where" and index > 0)
    return is_form and all(value is None or _is_computed_from(value, forms) for value in node.inputs)


def _is_computed_from(value: ir.Value, forms: Collection[ir.Value]) -> bool:
    """Whether a value depends on no input, or on an input alone and element by element.

    Negative ids count from the end of a table, and ids of images are replaced: both compare the ids with constants.
    """

    def is_source(one: ir.Value) -> bool:
        return one in forms or not depends_on_input(one)

    walked = upstream([value], stop=is_source)
    return all(is_source(one) or has_trait(one.producer(), *_ELEMENTWISE) for one in walked)


def _is_vocabulary(value: ir.Value | None) -> bool:
    """Whether a value is the constant 0, 1, 2, ... along its last axis."""
    numbers = small_constant(value)
    if numbers is None or numbers.dtype.kind not in "iu" or numbers.size < 3:
        return False
    return bool((numbers.reshape(-1) == range(numbers.size)).all()) and numbers.shape[-1] == numbers.size


def _table_rows(value: ir.Value | None) -> int:
    """The number of rows of a table, possibly cast, dequantized or repeated for the batch; 0 if it is none.

    A table that is computed from weights and lengths alone has as many rows as there are positions.
    """
    if value is None:
        return 0
    views = (Trait.IDENTITY, Trait.RESHAPE, Trait.REPEAT, Trait.TRANSPOSE, Trait.QUANTIZATION)
    tensor = constant_tensor(through(value, lambda node: has_trait(node, *views) or node.op_type == "Slice"))
    if tensor is not None:
        return max([size for size in tensor.shape if isinstance(size, int)][:-1], default=0)
    computed = value.producer() is not None and not depends_on_input(value)
    return _FEWEST_POSITIONS if computed and (value.shape is None or len(value.shape) >= 2) else 0
