"""Probe feeds: the arrays that a part of a graph is run with, in place of weights and token data.

Numbers that follow from shapes, masks and positions are what they are in a text. Tables of context, such as a causal
mask, are read wherever they are stored. Weights and token data are synthetic. bfloat16 is run as float32, because
runtimes lack kernels for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.analysis.mask_patterns import MaskPattern, unmasked
from kvsurgeon.analysis.probe_inputs import (
    Rows,
    batch_axis,
    block_input,
    evaluate,
    follows_from_length,
    join_sequences,
    mask_input,
    position_input,
    run_dtype,
    synthetic_values,
)
from kvsurgeon.analysis.token_data import is_token, token_inputs
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.graph.execution import InputType, build_model, initializer, open_session
from kvsurgeon.graph.query import downstream, upstream
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable
from kvsurgeon.weights.mapped import mapped_elements

POSITIONS_COUNT_UP = "position inputs count up by one from token to token"
MAX_WEIGHT_SIZE = 1 << 24  # elements of a weight that is replaced by synthetic values
MAX_COPIED_SIZE = 1 << 16  # elements of a table that is copied into the subgraph; larger ones stay in their file
MAX_COMPUTED_SIZE = 1 << 28  # elements of a computed table that is kept in memory

Feed = Callable[[Rows], np.ndarray]

_TOTAL = LengthVariable(Length.TOTAL)


class ProbeFeeds:
    """The inputs of a subgraph, with their arrays for any rows of a text.

    Args:
        flow: The token flow of the graph.
        probed: Token values that are fed with synthetic values instead of being computed.
        stops: Nodes below which nothing is computed from `probed`.
        assumptions: Receives the statements that the results rest on, each with the name of the value it is about.
        given: Values whose arrays `give` sets before a run.

    Attributes:
        probed: The token values that are fed, without those that are made of positions alone.
        masks: The graph inputs that mask tokens.
        feeds: For each other input of the subgraph, by name: its array for rows of a text.
        types: Element type and rank of each input of the subgraph, by name.
        initializers: Its constants.
    """

    def __init__(
        self,
        flow: TokenFlow,
        probed: Iterable[ir.Value] = (),
        stops: Collection[ir.Node] = (),
        assumptions: dict[str, str] | None = None,
        given: Collection[ir.Value] = (),
    ) -> None:
        self.flow = flow
        self._given = given
        self.masks: list[InputRole] = []
        self.feeds: dict[str, Feed] = {}
        self.types: dict[str, InputType] = {}
        self.initializers: list[onnx.TensorProto] = []
        self._totals: list[str] = []  # names of the feeds for all tokens in place of the new ones
        self._zeros: dict[str, Feed] = {}  # in place of the feeds that are scaled, if the scale is 0
        self._assumptions = {} if assumptions is None else assumptions
        self._last: tuple[Rows, dict[str, np.ndarray]] | None = None
        self._roles = {given.value: given for given in flow.inputs}
        self.probed = frozenset(value for value in probed if not self._is_made_of_positions(value))
        self._computed = set(downstream((*self.probed, *given), stop=lambda node: node in stops))

    def add(self, value: ir.Value) -> bool:
        """Add a feed for a value; return False if it must be computed."""
        fact, variable, name = self.flow.shapes[value], self._roles.get(value), value.name or ""
        tensor = constant_tensor(value)
        if value in self.probed or value in self._given:
            self._add_synthetic(value)
        elif tensor is not None:
            self._add_constant(value, tensor)
        elif variable is not None and variable.holds_positions:
            self._assumptions.setdefault(POSITIONS_COUNT_UP, name)
            self._add_feed(value, value.dtype, len(variable.dimensions), partial(position_input, variable))
        elif variable is not None and variable.opens_block:
            self._add_feed(value, value.dtype, len(variable.dimensions), partial(block_input, variable, 0))
        elif variable is not None:
            self.masks.append(variable)
            self.types[name] = (value.dtype or ir.DataType.FLOAT, len(variable.dimensions))
        elif fact.value is not None and fact.dtype is not None and follows_from_length(fact.value):
            numbers, dtype = fact.value, run_dtype(fact.dtype).numpy()
            self._add_feed(value, fact.dtype, numbers.ndim, lambda rows: evaluate(numbers, rows).astype(dtype))
        elif (table := computed_table(self.flow, value)) is not None:
            self._add_feed(value, fact.dtype, table.ndim, lambda _rows: table)
        elif is_token(self.flow, value) and value not in self._computed and not self._is_made_of_positions(value):
            self._add_synthetic(value)
        else:
            return False
        return True

    def add_total(self, value: ir.Value, name: str) -> None:
        """Add synthetic values for all tokens of a text in place of a value of the new tokens."""
        fact, axes = self.flow.shapes[value], self.flow.axes.get(value, ())
        axes = tuple(axis.with_variable(_TOTAL) for axis in axes)

        def feed(rows: Rows) -> np.ndarray:
            sizes, number = rows.sizes(fact.shape or (), axes), self._number(value)
            return synthetic_values(sizes, axes, rows.keys, fact.dtype, tensor=number)

        self._totals.append(name)
        dtype = run_dtype(fact.dtype or ir.DataType.FLOAT)
        self.feeds[name] = feed
        self._zeros[name] = lambda rows: np.zeros(rows.sizes(fact.shape or (), axes), dtype.numpy())
        self.types[name] = (dtype, fact.rank or 0)

    def give(self, name: str, feed: Feed) -> None:
        """Give an input of the subgraph other arrays than it has by its role."""
        self.feeds[name], self._last = feed, None

    def arrays(
        self,
        rows: Rows,
        mask: MaskPattern = unmasked,
        *,
        only_input: InputRole | None = None,
        only_sequence: int | None = None,
        scale: float = 1.0,
        number: float | None = None,
        tokens: np.ndarray | None = None,
        second_tokens: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the inputs of the subgraph for a batch of two sequences, by name.

        Args:
            rows: The tokens.
            mask: The tokens that the mask inputs mask.
            only_input: The only mask input that masks them; None for all.
            only_sequence: Index of the only sequence that is masked; None for both.
            scale: Factor on the synthetic values of `probed`.
            number: The elements of inputs without tokens; those of their roles by default.
            tokens: [total], the number of the token at each position; 0, 1, 2, ... by default.
            second_tokens: [total], the same for the second sequence if it differs from the first.
        """
        feeds = self._arrays_at(rows, zeros=self._zeros if scale == 0.0 else {})
        for name in self._totals if scale not in (0.0, 1.0) else ():
            feeds[name] = (feeds[name] * scale).astype(feeds[name].dtype)
        for value in self.probed if scale != 0.0 and (tokens is not None or scale != 1.0) else ():
            if value.name not in feeds:
                continue  # only its total is read
            array = feeds[value.name or ""]
            if tokens is not None:
                array = self._synthetic(value, rows, tokens)
                second = array if second_tokens is None else self._synthetic(value, rows, second_tokens)
                array = join_sequences(array, second, batch_axis(self.flow.shapes[value].shape))
            feeds[value.name or ""] = array if scale == 1.0 else (array * scale).astype(array.dtype)
        for given in self.masks:
            visible = mask(rows.total) if only_input in (None, given) else np.ones(rows.total, dtype=bool)
            feeds[given.value.name or ""] = mask_input(given, visible, only_sequence, rows, number)
        return feeds

    def _arrays_at(self, rows: Rows, zeros: Mapping[str, Feed]) -> dict[str, np.ndarray]:
        """Return the array of each feed, zeros for some; the last rows are kept, since they run with several masks."""
        if self._last is None or self._last[0] != rows:
            self._last = rows, {}
        kept = self._last[1]
        for name in self.feeds.keys() - kept.keys() - zeros.keys():
            kept[name] = np.asarray(self.feeds[name](rows))
        return kept | {name: feed(rows) for name, feed in zeros.items()}

    def _is_made_of_positions(self, value: ir.Value) -> bool:
        """Return whether token data is computed from position inputs alone."""
        if value in self._roles:
            return self._roles[value].holds_positions
        node = value.producer()
        if node is None or has_trait(node, Trait.PRODUCT, Trait.LOOKUP):
            return False
        tokens = token_inputs(self.flow, node)
        return bool(tokens) and all(self._is_made_of_positions(source) for source in tokens)

    def _add_constant(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        if tensor.dtype is ir.DataType.STRING:
            return
        small = not isinstance(tensor, ir.ExternalTensor) and tensor.size <= MAX_WEIGHT_SIZE
        if not is_weight(tensor) or small or self._is_table(value):
            try:
                self._add_table(value, tensor)
            except (OSError, ValueError):  # its file is missing
                self._add_synthetic(value)
        elif tensor.size > MAX_WEIGHT_SIZE:
            raise UnsupportedError(
                "context reads a weight that is too large to run with synthetic values",
                code=Code.CONTEXT_NOT_RUNNABLE, at=value.name, expected=f"at most {MAX_WEIGHT_SIZE} elements",
                found=str(tensor.size),
            )  # fmt: skip
        else:
            self._add_synthetic(value)

    def _is_table(self, value: ir.Value) -> bool:
        """Return whether a constant is read by context, or as a part of it: its content must be known."""
        kinds = self.flow.kinds
        for node, index in value.uses():
            kind = kinds.get(node.outputs[0], ValueKind.CONSTANT)
            if kind is ValueKind.CONTEXT or (node, index) in self.flow.demands:
                return True
            if kind is ValueKind.CONSTANT and node in self.flow.order and self._is_table(node.outputs[0]):
                return True
        return False

    def _add_table(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        if tensor.size <= MAX_COPIED_SIZE:
            if tensor.dtype is ir.DataType.BFLOAT16:
                tensor = ir.Tensor(np.asarray(tensor.numpy()).astype(np.float32))
            self.initializers.append(initializer(value.name, tensor))
            return
        array = np.asarray(mapped_elements(tensor))  # only what is read is loaded
        if tensor.dtype is ir.DataType.BFLOAT16:
            array = array.astype(np.float32)
        self._add_feed(value, tensor.dtype, array.ndim, lambda _rows: array)

    def _add_synthetic(self, value: ir.Value) -> None:
        fact = self.flow.shapes[value]
        rank = None if fact.shape is None else len(fact.shape)
        if value in self.probed:
            dtype = run_dtype(fact.dtype or ir.DataType.FLOAT)
            self._zeros[value.name or ""] = lambda rows: np.zeros(self._sizes(value, rows), dtype.numpy())
        self._add_feed(value, fact.dtype, rank, lambda rows: self._synthetic(value, rows, rows.keys))

    def _sizes(self, value: ir.Value, rows: Rows) -> list[int]:
        return rows.sizes(self.flow.shapes[value].shape or (), self.flow.axes.get(value, ()))

    def _synthetic(self, value: ir.Value, rows: Rows, tokens: np.ndarray) -> np.ndarray:
        """Return synthetic values for tokens with these numbers."""
        fact, axes = self.flow.shapes[value], self.flow.axes.get(value, ())
        queries = tokens[rows.start : rows.stop]
        return synthetic_values(self._sizes(value, rows), axes, tokens, fact.dtype, queries, self._number(value))

    def _number(self, value: ir.Value) -> int:
        """Return the place in the graph of the node that computes a value, or of the first one that reads it."""
        made, order = value.producer(), self.flow.order
        nodes = [made] if made is not None else [node for node, _ in value.uses()]
        return min((order[node] for node in nodes if node in order), default=0)

    def _add_feed(self, value: ir.Value, dtype: ir.DataType | None, rank: int | None, feed: Feed) -> None:
        if dtype is None or rank is None:
            raise UnsupportedError("the type of a tensor is unknown", code=Code.UNTRACEABLE_SEQUENCE, at=value.name)
        self.feeds[value.name or ""] = feed
        self.types[value.name or ""] = (run_dtype(dtype), rank)


def computed_table(flow: TokenFlow, value: ir.Value) -> np.ndarray | None:
    """Return a large constant that the graph computes from others, to compute it once; None for other values."""
    if flow.kinds.get(value, ValueKind.CONSTANT) is not ValueKind.CONSTANT or value.producer() is None:
        return None
    shape = flow.shapes[value].shape or ()
    sizes = [size for size in shape if isinstance(size, int)]
    if len(sizes) < len(shape) or not MAX_COPIED_SIZE < math.prod(sizes) <= MAX_COMPUTED_SIZE:
        return None
    sources, nodes = ProbeFeeds(flow), list[ir.Node]()
    for one in upstream([value], stop=lambda one: constant_tensor(one) is not None):
        node = one.producer()
        if constant_tensor(one) is not None:
            sources.add(one)
        elif node is not None:
            nodes.append(node)
    model = build_model(
        sorted(dict.fromkeys(nodes), key=flow.order.__getitem__), inputs=sources.types, outputs=[value.name],
        opsets=flow.opsets, initializers=sources.initializers,
    )  # fmt: skip
    (array,) = open_session(model).run(None, sources.arrays(Rows.of_text(1)))
    return np.asarray(array)
