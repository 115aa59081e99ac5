"""What is learnt while tokens are followed through a graph, and how one node is looked at while that happens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import sympy

from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.ops.table import operator_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.symbolic.fact import OperatorCall
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

Place = tuple[ir.Node, int]  # a node and the index of one of its inputs

PER_CALL = "dynamic quantisation: ranges are taken over the tokens of one call"


@dataclass(frozen=True, kw_only=True)
class ScoreProduct:
    """Where two sequence axes meet: queries and keys, which is which being told by the context product."""

    node: ir.Node
    left: int  # indices of the node's inputs
    right: int
    left_variable: LengthVariable
    right_variable: LengthVariable

    def key_index(self) -> int:
        """Index of the input that holds the keys."""
        return self.left if self.left_variable.resolved() is Length.TOTAL else self.right

    def query_index(self) -> int:
        """Index of the input that holds the queries."""
        return self.right if self.left_variable.resolved() is Length.TOTAL else self.left


@dataclass(frozen=True, kw_only=True)
class ContextProduct:
    """Where the keys' axis of the weights is summed against the values."""

    node: ir.Node
    weights: int
    value: int
    variable: LengthVariable  # of the keys' axis

    @property
    def zero_point(self) -> ir.Value | None:
        """Which number of quantised weights means 0, where that is said."""
        operator = operator_of(self.node)
        places = None if operator is None else operator.zero_points
        index = None if places is None else places[self.weights > self.value]
        return self.node.inputs[index] if index is not None and index < len(self.node.inputs) else None

    @property
    def weights_read(self) -> tuple[ir.Value, ...]:
        """The weights, and their zero point where there is one."""
        found = (self.node.inputs[self.weights], self.zero_point)
        return tuple(value for value in found if value is not None)


@dataclass(frozen=True, kw_only=True)
class FusedAttention:
    """One operator that holds a whole attention, with the indices of its inputs."""

    node: ir.Node
    query: int
    key: int
    value: int
    mask: int | None
    causal: bool
    layout: tuple[str, ...]  # of key and value
    packed_heads: int = 1  # key heads that lie side by side on the last axis of key and value


@dataclass(frozen=True, kw_only=True)
class SequenceState:
    """Nodes outside attention whose result depends on the tokens so far, and the one axis that holds them there."""

    nodes: tuple[ir.Node, ...]
    places: tuple[Place, ...]  # where tokens are read that the nodes do not make
    axes: Axes

    @property
    def result(self) -> ir.Value:
        """What is read elsewhere."""
        return self.nodes[-1].outputs[0]


@dataclass(kw_only=True)
class TokenFlow:
    """What was learnt about token data."""

    shapes: Shapes
    kinds: dict[ir.Value, ValueKind]
    length: Dimension
    batch: Dimension  # of the token inputs; 1 where they have no batch axis
    inputs: Sequence[InputRole]
    opsets: Mapping[str, int]
    order: dict[ir.Node, int]  # place of each node in the graph
    query_axis: LengthVariable = field(default_factory=lambda: LengthVariable(Length.NEW, "the tokens"))
    axes: dict[ir.Value, Axes] = field(default_factory=dict)
    demands: dict[Place, Axes] = field(default_factory=dict)  # where context meets tokens: its axes, in their variables
    operands: dict[Place, LengthVariable] = field(
        default_factory=dict
    )  # token inputs whose tokens stand in another variable
    other_inputs: list[Place] = field(default_factory=list)  # those of them that no product reads
    learned_row_inputs: dict[Place, LengthVariable] = field(
        default_factory=dict
    )  # where rows of the model's own are put beside tokens
    targets: dict[ir.Node, int] = field(default_factory=dict)  # nodes whose result's shape is given by that input
    diagonals: dict[ir.Node, tuple[LengthVariable, LengthVariable]] = field(
        default_factory=dict
    )  # `Trilu` over rows and columns
    routed_regions: dict[ir.Node, Hashable] = field(default_factory=dict)  # nodes inside, and how their island computes
    addresses: set[Place] = field(default_factory=set)  # context that stays as long as the call
    parameters: dict[Place, LengthVariable] = field(
        default_factory=dict
    )  # bounds in which the length counts in this variable
    scores: list[ScoreProduct] = field(default_factory=list)
    products: list[ContextProduct] = field(default_factory=list)
    fused: list[FusedAttention] = field(default_factory=list)
    states: list[SequenceState] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)  # what could not be proved, and where first
    mixes_keys: dict[ir.Node, LengthVariable] = field(
        default_factory=dict
    )  # operators along an open axis: keys, or nothing
    last: set[ir.Value] = field(default_factory=set)  # made of the last token alone
    per_call: set[ir.Value] = field(default_factory=set)  # made with ranges over all tokens of a call

    def has_learned_rows(self, variable: LengthVariable) -> bool:
        """Whether keys and values of a variable have rows of the model's own beside them."""
        return any(one.root() is variable.root() for one in self.learned_row_inputs.values())

    def origin(self, place: Place) -> Place:
        """Where the tokens of an operand alone are read: before rows of the model's own were put beside them."""
        value, seen = place[0].inputs[place[1]], place
        while (
            value is not None
            and (node := value.producer()) is not None
            and any(self.has_learned_rows(axis.variable) for axis in self.axes.get(value, ()))
        ):
            index = next(
                i for i, one in enumerate(node.inputs) if one is not None and self.kinds.get(one) is ValueKind.TOKEN
            )
            value, seen = node.inputs[index], (node, index)
            if seen in self.learned_row_inputs:
                return seen
        return place

    @property
    def state_nodes(self) -> frozenset[ir.Node]:
        """Nodes that are computed for all tokens so far, outside attention."""
        return frozenset(node for recall in self.states for node in recall.nodes)


@dataclass(slots=True)
class NodeVisit:
    """One node on the tokens' way."""

    flow: TokenFlow
    call: OperatorCall

    @property
    def node(self) -> ir.Node:
        """The node itself."""
        return self.call.node

    def kind(self, index: int) -> ValueKind:
        """The kind of an input; a missing one is constant."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return ValueKind.CONSTANT if value is None else self.flow.kinds.get(value, ValueKind.CONSTANT)

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

    def tokens(self) -> list[int]:
        """Return the indices of the inputs that are token data."""
        return [index for index in range(len(self.node.inputs)) if self.kind(index) is ValueKind.TOKEN]

    def demand(self, index: int, axes: Axes) -> None:
        """Note that an input which is not token data has these axes in these variables."""
        if axes:
            self.flow.demands[self.node, index] = tuple(sorted(axes, key=lambda axis: axis.axis))

    def parameter(self, indices: tuple[int, ...], variable: LengthVariable) -> None:
        """Note that a length in these inputs is that of a variable."""
        for index in indices:
            numbers = self.call.numbers(index)
            if numbers is not None and any(self.holds_length(number) for number in numbers):
                self.flow.parameters[self.node, index] = variable

    def holds_length(self, size: Dimension) -> bool:
        """Whether a dimension varies with the number of tokens."""
        return isinstance(size, sympy.Expr) and LENGTH in size.free_symbols

    def is_batch(self, size: Dimension) -> bool:
        """Whether a dimension varies with the number of sequences."""
        return isinstance(size, sympy.Expr) and BATCH in size.free_symbols

    def assume(self, what: str) -> None:
        """Note something that could not be proved."""
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

    def untraceable(self, index: int) -> UnsupportedError:
        """Return an error: an axis of the sequence length of an input is not known to hold tokens."""
        return self.refusal("cannot trace the sequence axis", at=self.node.inputs[index])

    def scores(self, left: int, right: int) -> tuple[LengthVariable, LengthVariable]:
        """Note that two inputs are multiplied query by key; return the variables of their axes, which are open."""
        name = self.node.outputs[0].name or ""
        variables = LengthVariable(at=name), LengthVariable(at=name)
        self.flow.scores.append(
            ScoreProduct(
                node=self.node, left=left, right=right, left_variable=variables[0], right_variable=variables[1]
            )
        )
        return variables

    def mixing(self) -> UnsupportedError:
        """An error: this node lets a token see others."""
        return UnsupportedError(
            f"{self.node.op_type} mixes tokens along the sequence outside attention, which no KV cache can carry",
            at=self.node.outputs[0].name,
            hint="its state is remembered only where it is seen to depend on no later token",
        )

    def mix_along(self, axis: SequenceAxis) -> None:
        """Note that the node works along a sequence axis: right only where that is the axis of the keys.

        Raises:
            UnsupportedError: It is the query_axis's.
        """
        if axis.variable.resolved() is Length.NEW or not axis.without_rows.is_plain:
            raise self.mixing()
        axis.variable.root().mixed_at.append(self.node.outputs[0].name or "")
        self.flow.mixes_keys[self.node] = axis.variable

    def open_length(self, axis: SequenceAxis, index: int, variable: LengthVariable | None = None) -> SequenceAxis:
        """Let an input's tokens stand in a variable that is still open: they may turn out to be the keys'."""
        variable = variable or LengthVariable(at=self.node.outputs[0].name or "")
        self.flow.operands[self.node, index] = variable
        self.flow.other_inputs.append((self.node, index))
        return axis.with_variable(variable)

    def meet(self, mine: tuple[int, SequenceAxis], theirs: tuple[int, SequenceAxis]) -> SequenceAxis:
        """Align sequence axes of two inputs, each with its index; tokens of the query_axis follow an open variable."""
        (_, one), (second, other) = mine, theirs
        same = dim.is_equal(one.outer, other.outer) and dim.is_equal(one.inner, other.inner)
        if not same or (one.rows_before, one.rows_after) != (other.rows_before, other.rows_after):
            raise self.refusal("two tensors hold the tokens in different places", at=self.node.inputs[second])
        if one.variable.resolved() is Length.NEW and other.variable.resolved() is None:
            (_, one), (second, other) = theirs, mine
        if one.variable.resolved() is None and other.variable.resolved() is Length.NEW and not one.variable.root().bias:
            return self.open_length(other, second, one.variable)
        if not one.variable.agree(other.variable):
            raise self.refusal("queries and keys are added to each other", at=self.node.inputs[second])
        return one


def is_of_queries(axes: Axes) -> bool:
    """Whether all sequence axes of a tensor have the new length."""
    return all(axis.variable.resolved() is Length.NEW for axis in axes)
