"""The token flow of a graph: sequence axes of token data, and one node as propagation visits it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir
import sympy

from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import AttentionInputs, Trait
from kvsurgeon.ops.table import has_trait, operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

Place = tuple[ir.Node, int]  # a node and the index of one of its inputs

PER_CALL = "dynamic quantization: ranges are taken over the tokens of one call"


@dataclass(frozen=True, kw_only=True)
class ScoreProduct:
    """A product of queries and keys; the context product decides which operand holds which.

    Attributes:
        node: The product.
        left: Index of the left operand.
        right: Index of the right operand.
        left_variable: Length variable of the left operand's sequence axis.
        right_variable: Length variable of the right operand's sequence axis.
        compares: Whether the node compares the operands, as numbers of segments are.
    """

    node: ir.Node
    left: int
    right: int
    left_variable: LengthVariable
    right_variable: LengthVariable
    compares: bool = False

    def key_index(self) -> int:
        """Return the index of the input that holds the keys."""
        return self.left if self.left_variable.resolved() is Length.TOTAL else self.right

    def query_index(self) -> int:
        """Return the index of the input that holds the queries."""
        return self.right if self.left_variable.resolved() is Length.TOTAL else self.left


@dataclass(frozen=True, kw_only=True)
class ContextProduct:
    """A product that sums attention weights against values along the keys' axis.

    Attributes:
        node: The product.
        weights: Index of the operand that holds the weights.
        value: Index of the operand that holds the values.
        variable: Length variable of the keys' axis.
    """

    node: ir.Node
    weights: int
    value: int
    variable: LengthVariable

    @property
    def zero_point(self) -> ir.Value | None:
        """The zero point of quantized weights, if there is one."""
        operator = operator_of(self.node)
        places = None if operator is None else operator.zero_points
        index = None if places is None else places[self.weights > self.value]
        return self.node.inputs[index] if index is not None and index < len(self.node.inputs) else None

    @property
    def weights_read(self) -> tuple[ir.Value, ...]:
        """The weights, and their zero point if there is one."""
        found = (self.node.inputs[self.weights], self.zero_point)
        return tuple(value for value in found if value is not None)


@dataclass(frozen=True, kw_only=True)
class FusedAttention:
    """An operator that computes a whole attention, with what its axis links state."""

    node: ir.Node
    inputs: AttentionInputs


@dataclass(frozen=True, kw_only=True)
class RecurrentState:
    """A state of fixed size that a region of nodes passes from token to token.

    Attributes:
        start: The input of a node that the state before the text replaces: zeros in the graph.
        value: The value whose last row is the state after the text.
        axis: Index of the axis of rows of `value`, along which the start has one; None if both are the state itself.
        sizes: Shape of the state, the batch first.
    """

    start: Place
    value: ir.Value
    axis: int | None
    sizes: tuple[Dimension, ...]


@dataclass(frozen=True, kw_only=True)
class SequenceState:
    """Nodes outside attention whose result depends on the tokens so far.

    Attributes:
        nodes: The nodes, in execution order; the last one computes the result.
        places: Inputs of these nodes that hold token data and that no node of them computes.
        axes: The sequence axis of the result.
        measured: Whether no later token was observed to count; axis links prove it otherwise.
        recurrent: The state of fixed size that replaces the inputs of earlier tokens; None if they are cached.
        output: Which output of the last node is the result.
    """

    nodes: tuple[ir.Node, ...]
    places: tuple[Place, ...]
    axes: Axes
    measured: bool = False
    recurrent: RecurrentState | None = None
    output: int = 0

    @property
    def result(self) -> ir.Value:
        """The value that other nodes read."""
        return self.nodes[-1].outputs[self.output]


@dataclass(kw_only=True)
class TokenFlow:
    """The token axes of every value, and the context that token data is combined with.

    Propagation fills it in; after `analyze` returned it does not change.

    Attributes:
        shapes: Shape, type and known numbers of each value.
        kinds: Kind of each value that is not constant.
        length: The one length that the export knows.
        batch: Batch size of the token inputs; 1 if they have no batch axis.
        inputs: Roles of the graph inputs.
        fixed: Context that is the same in every call, each with the inputs whose content it is computed from.
        opsets: Versions of the operator sets.
        order: Position of each node in the graph.
        query_axis: Length variable of the new tokens.
        axes: Sequence axes of each value of token data.
        batch_variable: Variable of the number of sequences, for batch axes that are traced like sequence axes.
        batch_layouts: Where the batch is in each value in which it shares an axis with other dimensions.
        demands: Axes that token data asks of context at each input.
        operands: Inputs whose sequence axis has another length variable than the value that they read.
        other_inputs: Those of them that no product reads.
        learned_row_inputs: Inputs to which learned rows are added, with their length variable.
        targets: For each node whose result has a shape that is given, the index of that input.
        diagonals: Length variables of the rows and columns of each triangle that is cut out of token data.
        routed_regions: Nodes inside routed regions, with a structural hash of the region.
        addresses: Inputs that hold indices within one call, and stay as long as the call.
        parameters: Inputs in which a length refers to a length variable.
        scores: Products of queries and keys.
        products: Products of weights and values.
        fused: Operators that compute a whole attention.
        states: Sequence states outside attention.
        state_nodes: Their nodes, which are computed at another length.
        region_numbers: Numbers of values in regions that may be recurrences, by what computes them.
        recurrence_verdicts: Whether such a region is a recurrence, by these numbers.
        assumed: What propagation could not prove, with the first value that it concerns.
        mixes_keys: Nodes that mix elements along an axis that must turn out to be the keys'.
        last: Values computed from the last token alone, or from the last ones that an input gives the number of.
        counts: For each node that selects the last tokens of a call, the input that gives their number.
        per_call: Ranges over all tokens of a call, and numbers that count steps of one.
    """

    shapes: Shapes
    kinds: dict[ir.Value, ValueKind]
    length: Dimension
    batch: Dimension
    inputs: Sequence[InputRole]
    fixed: Mapping[ir.Value, frozenset[ir.Value]]
    opsets: Mapping[str, int]
    order: dict[ir.Node, int]
    query_axis: LengthVariable = field(default_factory=lambda: LengthVariable(Length.NEW, "the tokens"))
    axes: dict[ir.Value, Axes] = field(default_factory=dict)
    batch_variable: LengthVariable = field(default_factory=lambda: LengthVariable(at="the batch"))
    batch_layouts: dict[ir.Value, SequenceAxis] = field(default_factory=dict)
    demands: dict[Place, Axes] = field(default_factory=dict)
    operands: dict[Place, LengthVariable] = field(default_factory=dict)
    other_inputs: list[Place] = field(default_factory=list)
    learned_row_inputs: dict[Place, LengthVariable] = field(default_factory=dict)
    targets: dict[ir.Node, int] = field(default_factory=dict)
    diagonals: dict[ir.Node, tuple[LengthVariable, LengthVariable]] = field(default_factory=dict)
    routed_regions: dict[ir.Node, Hashable] = field(default_factory=dict)
    addresses: set[Place] = field(default_factory=set)
    parameters: dict[Place, LengthVariable] = field(default_factory=dict)
    scores: list[ScoreProduct] = field(default_factory=list)
    products: list[ContextProduct] = field(default_factory=list)
    fused: list[FusedAttention] = field(default_factory=list)
    states: list[SequenceState] = field(default_factory=list)
    state_nodes: set[ir.Node] = field(default_factory=set)
    region_numbers: dict[Hashable, int] = field(default_factory=dict)
    recurrence_verdicts: dict[Hashable, bool] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)
    mixes_keys: dict[ir.Node, LengthVariable] = field(default_factory=dict)
    last: set[ir.Value] = field(default_factory=set)
    counts: dict[ir.Node, ir.Value] = field(default_factory=dict)
    per_call: set[ir.Value] = field(default_factory=set)
    changes: dict[ir.Value, set[int]] = field(default_factory=dict)

    def has_learned_rows(self, variable: LengthVariable) -> bool:
        """Return whether keys and values of a length variable have learned rows."""
        return any(one.root() is variable.root() for one in self.learned_row_inputs.values())

    def origin(self, place: Place) -> Place:
        """Return the input that reads the tokens of an operand before learned rows were added to them."""
        value, at = place[0].inputs[place[1]], place
        while (
            value is not None
            and (node := value.producer()) is not None
            and any(self.has_learned_rows(axis.variable) for axis in self.axes.get(value, ()))
        ):
            index = next(
                i for i, one in enumerate(node.inputs) if one is not None and self.kinds.get(one) is ValueKind.TOKEN
            )
            value, at = node.inputs[index], (node, index)
            if at in self.learned_row_inputs:
                return at
        return place

    def is_range(self, value: ir.Value) -> bool:
        """Return whether a value is a scale or a zero point of dynamic quantization, or computed from such alone."""
        return value in self.per_call and not self.axes.get(value)

    @property
    def cached_states(self) -> list[SequenceState]:
        """The sequence states whose inputs are cached."""
        return [state for state in self.states if state.recurrent is None]

    @property
    def recurrences(self) -> list[tuple[SequenceState, RecurrentState]]:
        """The sequence states of fixed size, each with what it passes from token to token."""
        return [(state, state.recurrent) for state in self.states if state.recurrent is not None]

    def position(self, value: ir.Value) -> int:
        """Return the position in the graph of the node that computes a value; -1 of an input or a constant."""
        node = value.producer()
        return -1 if node is None else self.order.get(node, -1)

    @cached_property
    def read_for_content(self) -> set[ir.Node]:
        """Nodes of which more is read than the shapes of their results."""
        read: set[ir.Value] = {value for node in self.order for value in node.outputs if value.is_graph_output()}
        found: set[ir.Node] = set()
        for node in reversed(self.order):
            if any(value in read for value in node.outputs):
                found.add(node)
                read.update(content_inputs(node))
        return found


@dataclass(slots=True)
class NodeVisit:
    """One node during propagation: its inputs, and what is noted about it."""

    flow: TokenFlow
    call: OperatorCall
    node: ir.Node = field(init=False)
    kinds: tuple[ValueKind, ...] = field(init=False)  # of the inputs; a missing one is constant
    tokens: tuple[int, ...] = field(init=False)  # indices of the inputs that are token data

    def __post_init__(self) -> None:
        """Read the kinds of the inputs, which each rule asks for several times."""
        self.node, kinds = self.call.node, self.flow.kinds
        self.kinds = tuple(
            [
                ValueKind.CONSTANT if value is None else kinds.get(value, ValueKind.CONSTANT)
                for value in self.node.inputs
            ]
        )
        self.tokens = tuple([index for index, kind in enumerate(self.kinds) if kind is ValueKind.TOKEN])

    def kind(self, index: int) -> ValueKind:
        """The kind of an input; a missing one is constant."""
        return self.kinds[index] if index < len(self.kinds) else ValueKind.CONSTANT

    def axes(self, index: int) -> Axes:
        """The sequence axes of an input."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return () if value is None else self.flow.axes.get(value, ())

    def shape(self, index: int) -> tuple[Dimension, ...]:
        """The shape of an input."""
        shape = self.call.fact(index).shape
        if shape is None:
            raise self.refusal("a tensor's rank is unknown", at=self.node.inputs[index])
        return shape

    def result_shape(self, index: int = 0) -> tuple[Dimension, ...]:
        """The shape of an output."""
        shape = self.call.results[index].shape
        if shape is None:
            raise self.refusal("a tensor's rank is unknown")
        return shape

    def demand(self, index: int, axes: Axes) -> None:
        """Note that an input that is not token data must have these axes."""
        if axes:
            self.flow.demands[self.node, index] = tuple(sorted(axes, key=lambda axis: axis.axis))

    def parameter(self, indices: tuple[int, ...], variable: LengthVariable) -> None:
        """Note that a length in these inputs refers to a length variable."""
        for index in indices:
            numbers = self.call.numbers(index)
            if numbers is not None and any(self.holds_length(number) for number in numbers):
                self.flow.parameters[self.node, index] = variable

    def holds_length(self, size: Dimension) -> bool:
        """Whether a dimension varies with the number of tokens."""
        return isinstance(size, sympy.Expr) and dim.contains(size, LENGTH)

    def batch_axes(self, fact: Fact) -> list[int]:
        """Return the axes of a tensor whose size varies with the number of sequences."""
        sizes = enumerate(fact.shape or ())
        return [axis for axis, size in sizes if not isinstance(size, int) and dim.contains(size, BATCH)]

    def assume(self, what: str) -> None:
        """Note an assumption that cannot be proved."""
        self.flow.assumed.setdefault(what, self.node.outputs[0].name or "")

    def refusal(
        self, reason: str, *, at: ir.Value | None = None, expected: str | None = None, found: str | None = None,
        hint: str | None = None, code: Code = Code.UNTRACEABLE_SEQUENCE,
    ) -> UnsupportedError:  # fmt: skip
        """Return an error about this node."""
        name = (at or self.node.outputs[0]).name
        return UnsupportedError(
            f"{self.node.op_type}: {reason}", at=name, expected=expected, found=found, hint=hint, code=code
        )

    def fixed_length_hint(self, size: Dimension) -> str | None:
        """Return a hint if the node gives an axis of tokens a size that is a number, and not the declared length."""
        if not isinstance(size, int) or size == self.flow.length or has_trait(self.node, Trait.SELECT):
            return None
        return f"for a graph of {size} tokens declare that length, as rename-dims does; or export with dynamic axes"

    def untraceable(self, index: int) -> UnsupportedError:
        """Return an error: an axis of the sequence length of an input is not known to hold tokens."""
        return self.refusal("cannot trace the sequence axis", at=self.node.inputs[index])

    def scores(self, left: int, right: int) -> tuple[LengthVariable, LengthVariable]:
        """Note that two inputs are multiplied query by key; return the variables of their axes, which are open."""
        name = self.node.outputs[0].name or ""
        variables = LengthVariable(at=name), LengthVariable(at=name)
        self.flow.scores.append(
            ScoreProduct(
                node=self.node, left=left, right=right, left_variable=variables[0], right_variable=variables[1],
                compares=self.call.result.dtype is ir.DataType.BOOL,
            )
        )  # fmt: skip
        return variables

    def mixing(self) -> UnsupportedError:
        """Return an error: the node mixes tokens."""
        return UnsupportedError(
            f"{self.node.op_type} mixes tokens along the sequence outside attention, so a KV cache is not enough",
            at=self.node.outputs[0].name, code=Code.MIXES_TOKENS,
            hint="it is supported only if its result for a token depends on no later token",
        )  # fmt: skip

    def mix_along(self, axis: SequenceAxis) -> None:
        """Note that the node mixes along a sequence axis: allowed only if that is the axis of the keys.

        Raises:
            UnsupportedError: It is the query_axis's, or holds more than a row for each token.
        """
        if axis.variable.resolved() is Length.NEW:
            raise self.mixing()
        if (axis.outer, axis.inner) != (1, 1):
            raise self.refusal(
                "it mixes along an axis of keys that holds more than the tokens", code=Code.MIXES_TOKENS,
                expected=f"a key for each token: {self.flow.length}", found=str(axis.size(self.flow.length)),
                hint="several rows for each position, such as states and actions, are not supported",
            )  # fmt: skip
        axis.variable.root().mixed_at.append(self.node.outputs[0].name or "")
        self.flow.mixes_keys[self.node] = axis.variable

    def open_length(self, axis: SequenceAxis, index: int, variable: LengthVariable | None = None) -> SequenceAxis:
        """Give an input's sequence axis a length variable that is still open: it may become the keys' axis."""
        variable = variable or LengthVariable(at=self.node.outputs[0].name or "")
        self.flow.operands[self.node, index] = variable
        self.flow.other_inputs.append((self.node, index))
        return axis.with_variable(variable)

    def meet(self, mine: tuple[int, SequenceAxis], theirs: tuple[int, SequenceAxis]) -> SequenceAxis:
        """Align sequence axes of two inputs, each with its index; tokens of the query_axis follow an open variable."""
        (_, one), (second, other) = mine, theirs
        same = dim.is_equal(one.outer, other.outer) and dim.is_equal(one.inner, other.inner)
        rows = [(side.rows_before, side.rows_after, side.most) for side in (one, other)]
        if not same or rows[0] != rows[1]:
            raise self.refusal("two inputs have the sequence axis in different places", at=self.node.inputs[second])
        if one.variable.resolved() is Length.NEW and other.variable.resolved() is None:
            (_, one), (second, other) = theirs, mine
        if one.variable.resolved() is None and other.variable.resolved() is Length.NEW and not one.variable.root().bias:
            return self.open_length(other, second, one.variable)
        if not one.variable.agree(other.variable):
            raise self.refusal("queries and keys are aligned with each other", at=self.node.inputs[second])
        return other if one.variable.bias and not other.variable.bias else one  # a mask may be that of other keys too


def is_of_queries(axes: Axes) -> bool:
    """Whether all sequence axes of a tensor have the new length."""
    return all(axis.variable.resolved() is Length.NEW for axis in axes)
