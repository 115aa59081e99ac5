"""An operator as every stage sees it: one entry says what it does to shapes, axes and lengths.

The stages hold engines that work on any entry: shape inference asks for `shape`, the sequence axes are propagated along
`axes`, context is computed at another length with `resize`. No stage knows an operator by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, NamedTuple

from kvsurgeon.ops.resizing import ResizeRule
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall, axis_of

Label = int | str
Labels = tuple[Label | None, ...]
ShapeRule = Callable[[OperatorCall], "Fact | list[Fact]"]


class UntraceableAxesError(Exception):
    """The axes of one call cannot be linked; the message says why."""


_NONE: Mapping[Label, Any] = MappingProxyType({})


class AxisLinks(NamedTuple):
    """Links between the axes of a node's inputs and outputs: which of them correspond, element by element.

    Equal labels correspond. An axis of size 1 may face a larger one of its label: it is broadcast. An axis without a
    label corresponds to no other.

    Attributes:
        inputs: A label for each axis of each input; None for an input that is a parameter of the whole node.
        outputs: The same for each output.
        mixed: Labels along which elements influence each other, as along the axis of a `Softmax`.
        blocked: Labels along which a sequence axis cannot be traced at all, with the reason; None means that the
            operator mixes elements along it.
        windows: For a mixed or blocked label, the offsets of the first and the last element of input 0 that an
            element depends on; infinite if all elements before or after it count.
        summed: Labels of a product that the result does not have; None if the operator is no product of two tensors.
        row_major: Elements of input 0 keep their row-major order, and labels say nothing.
        target: Input that gives the shape of the result.
        selected: Bounds (start, end, step) of each label of which a range is kept.
        length_inputs: Inputs in which a length refers to the axis of a label: bounds of a `Slice`.
        joined: Label of the axis along which the inputs are concatenated.
        padded: Elements added before and after each label.
        repeated: How many times a label's axis is tiled.
        ranked: How many elements of a label are kept at most, in another order.
        diagonal: Labels of the rows and columns of which a triangle is kept.
        addressing: How input 1 addresses input 0: "rows" (`Gather`), "elements", "nd" or "scatter_nd".
        sequence: Label that the operator itself takes as the sequence.
        token_rows: Every linked input holds the same tokens in its leading axes, in row-major order.
        constant_inputs: Inputs that must be constants.
        dynamic_range: The result depends on the range of all elements of the call.
        attention: Inputs of an operator that computes a whole attention.
    """

    inputs: tuple[Labels | None, ...]
    outputs: tuple[Labels, ...]
    mixed: frozenset[Label] = frozenset()
    blocked: Mapping[Label, str | None] = _NONE
    windows: Mapping[Label, tuple[float, float]] = _NONE
    summed: frozenset[Label] | None = None
    row_major: bool = False
    target: int | None = None
    selected: Mapping[Label, tuple[Dimension, Dimension, int]] = _NONE
    length_inputs: Sequence[tuple[int, Label]] = ()
    joined: Label | None = None
    padded: Mapping[Label, tuple[Dimension, Dimension]] = _NONE
    repeated: Mapping[Label, Dimension] = _NONE
    ranked: Mapping[Label, int] = _NONE
    diagonal: tuple[Label, Label] | None = None
    addressing: str | None = None
    sequence: Label | None = None
    token_rows: bool = False
    constant_inputs: tuple[int, ...] = ()
    dynamic_range: bool = False
    attention: AttentionInputs | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionInputs:
    """Indices of the inputs of an operator that computes a whole attention, and the layout of key and value."""

    query: int = 0
    key: int = 1
    value: int = 2
    mask: int | None = None
    causal: bool = False
    layout: tuple[str, ...]
    packed_heads: int = 1  # KV heads on the last axis of key and value


AxisRule = Callable[[OperatorCall], AxisLinks]


class Trait(Enum):
    """Further properties of an operator that stages ask for."""

    SHAPE_ONLY = auto()  # reads the shape of its input and nothing else
    REARRANGE = auto()  # gives elements of its inputs and no others, wherever their numbers are known
    IDENTITY = auto()  # gives the same elements, up to their type
    TRANSPOSE = auto()  # gives the same axes another order
    RESHAPE = auto()  # gives the same elements in row-major order another shape
    REPEAT = auto()  # repeats elements along axes
    LOOKUP = auto()  # reads a table (input 0) at places given by input 1
    SELECT = auto()  # selects a part of input 0
    ARITHMETIC = auto()  # adds, scales or bounds elements, so that an affine input stays one
    BOUND = auto()  # bounds elements
    ORDER = auto()  # compares by order
    LENGTH_SENSITIVE = auto()  # compares, bounds or divides: a length in its inputs may be a threshold
    ADD = auto()  # adds or subtracts
    SCALE = auto()  # multiplies or divides
    ROTARY = auto()  # turns angles into waves, or rotates by them
    PROJECTION = auto()  # multiplies with weights: too expensive to repeat for all tokens in a decode step
    PRODUCT = auto()  # a product of two tensors that sums over an axis
    BATCHED_MATMUL = auto()  # a product of matrices, batch by batch
    CONVOLUTION = auto()  # a sum of products of neighboring rows with a kernel
    EINSUM = auto()  # a floating-point product of tensors by an equation
    PACKED_WEIGHTS = auto()  # a product with weights in packed blocks
    SOFTMAX = auto()  # weights that sum to one along an axis, so that a common factor cancels
    NORMALIZATION = auto()  # normalizes along its last axes; further inputs are learned
    QUANTIZATION = auto()  # scales and zero points are learned
    ELEMENTWISE = auto()  # one tensor, element by element; further inputs are parameters
    BROADCAST = auto()  # several tensors, broadcast against each other
    ANALYTIC = auto()  # sums, products and exponentials of its inputs, which equal numbers at random points decide
    REDUCTION = auto()  # reduces along axes
    EXTREMUM_OR_MEAN = auto()  # a reduction that repeated elements do not change
    PARAMETERIZED = auto()  # inputs after the first say how, not what: sizes, positions, counts
    SCATTER = auto()  # writes elements of input 2, or 1, into a copy of input 0
    MOVE = auto()  # moves elements, or writes them at given positions
    ROUTING = auto()  # the shape of the result depends on the values of the tokens
    RECURRENT = auto()  # passes a state from token to token


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator.

    Attributes:
        op_type: Its name.
        domain: Its domain; "" is ai.onnx. onnxruntime registers several operators in ai.onnx and in com.microsoft, so
            an entry of one of these two serves both unless the other has an entry.
        since_version: First opset of the domain for which the entry holds.
        shape: Dimensions, types and known numbers of the outputs.
        axes: Which axes correspond; None if token data must not pass through the operator.
        type_only: Inputs of which only the type is read.
        extent_inputs: Inputs that say how many elements there are, and not which.
        resize: Inputs of the node at other lengths, for what links do not say; see `resizing/context_slices.py`.
        decomposition: Function that writes a node of exactly this domain in standard operators, as `module:function`.
            It gets a `kvsurgeon.decompose.fused_node.FusedNode`, and is imported when a model has such a node.
        traits: What else stages ask for.
        column_parameters: Inputs of a product that hold an element for each column of the result, or one for all.
        notation: A product as a sum over labeled axes.
        zero_points: Indices of the zero points of a product's left and right operand.
        state: Input of the state before the tokens, `[batch, ...]`, and output of the state after them.
    """

    op_type: str
    domain: str = ""
    since_version: int = 1
    shape: ShapeRule
    axes: AxisRule | None = None
    type_only: frozenset[int] = frozenset()
    extent_inputs: frozenset[int] = frozenset()
    resize: ResizeRule | None = None
    decomposition: str | None = None
    traits: frozenset[Trait] = frozenset()
    column_parameters: tuple[int, ...] = ()
    notation: Callable[[OperatorCall], Any] | None = None
    zero_points: tuple[int, int] | None = None
    state: tuple[int, int] | None = None


def entries(
    names: str, shape: ShapeRule, axes: AxisRule | None = None, *traits: Trait, **fields: Any
) -> list[Operator]:
    """Return an entry for each of several operators that differ in name only."""
    return [
        Operator(op_type=name, shape=shape, axes=axes, traits=frozenset(traits), **fields) for name in names.split()
    ]


def rank_of(call: OperatorCall, index: int) -> int:
    """Return the rank of an input.

    Raises:
        UntraceableAxesError: It is unknown.
    """
    rank = call.fact(index).rank
    if rank is None:
        raise UntraceableAxesError("the rank of a tensor is unknown")
    return rank


def identity_links(call: OperatorCall, index: int = 0) -> Labels:
    """Return a different label for each axis of an input."""
    return tuple(range(rank_of(call, index)))


def parameters(call: OperatorCall, *linked: Labels) -> tuple[Labels | None, ...]:
    """Return labels for the first inputs; the others are parameters."""
    return (*linked, *[None] * (len(call.inputs) - len(linked)))


def kept(call: OperatorCall, **fields: Any) -> AxisLinks:
    """Link every output to input 0, axis by axis; further inputs are parameters."""
    labels = identity_links(call)
    return AxisLinks(inputs=parameters(call, labels), outputs=(labels,) * len(call.node.outputs), **fields)


def along(call: OperatorCall, *axes: int, keep: bool = True, **fields: Any) -> AxisLinks:
    """Link every output to input 0, which is mixed along some axes; without `keep` the outputs do not have these."""
    labels = identity_links(call)
    mixed = frozenset(axis_of(axis, len(labels)) for axis in axes)
    result = labels if keep else tuple(label for label in labels if label not in mixed)
    outputs = (result,) * len(call.node.outputs)
    return AxisLinks(inputs=parameters(call, labels), outputs=outputs, mixed=mixed, **fields)


def broadcast_links(call: OperatorCall, **fields: Any) -> AxisLinks:
    """Link all inputs to the result, aligned from the right. Source: ONNX, Multidirectional Broadcasting."""
    ranks = [None if fact is None else rank_of(call, index) for index, fact in enumerate(call.inputs)]
    rank = max((one for one in ranks if one is not None), default=0)
    inputs = tuple(None if one is None else tuple(range(rank - one, rank)) for one in ranks)
    return AxisLinks(inputs=inputs, outputs=(tuple(range(rank)),) * len(call.node.outputs), **fields)
