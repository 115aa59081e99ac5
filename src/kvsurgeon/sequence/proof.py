"""The two obligations that axes alone do not prove, decided by running context without weights.

Causal: no query gives weight to a key after it. Prefix-stable: what context says of a position does not depend on how
many tokens follow. Both are tried at lengths on either side of every number that the context compares lengths with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Refused
from kvsurgeon.graph.constants import constant_tensor, small_constant
from kvsurgeon.sequence.analysis import Analysis, Head
from kvsurgeon.sequence.axes import Axes
from kvsurgeon.sequence.experiment import Experiment, downstream
from kvsurgeon.sequence.kinds import GivenInput, Kind
from kvsurgeon.sequence.looking import all_seen, close, cut_short, difference, left_padded, unfolded
from kvsurgeon.sequence.signature import Signatures

SHORT, LONG = 7, 40  # tokens
FAR = 1 << 16  # numbers above are no lengths
DENSE = 640  # the longest at which whole matrices of weights are looked at
USEFUL = 64  # tokens: a cache that is right for fewer is not worth having
SEEN = 1e-6  # a weight above this is one that counts

# fmt: off
_SWITCHES = frozenset({
    "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Equal", "Min", "Max", "Clip", "Div", "Mod", "Sub",
})
# fmt: on

Read = Callable[[np.ndarray, int], np.ndarray]  # an output and the length -> weights [..., query, key]
MaskFeed = Callable[[GivenInput, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Which keys the queries of one attention were seen to give weight to."""

    weights: np.ndarray  # [..., query, key] at the longest length that was tried
    padded: np.ndarray | None = None  # the same with the first keys masked by an input
    flat: np.ndarray | None = None  # the same where all scores are equal


@dataclass(kw_only=True)
class Proof:
    """What was found by running context."""

    seen: dict[int, Seen] = field(default_factory=dict)  # by attention
    lengths: tuple[int, ...] = ()
    limit: int | None = None  # the longest total length up to which context is stable, where there is one


def prove(analysis: Analysis) -> Proof:
    """Run the context of every attention and of every place where context meets tokens.

    Raises:
        Refused: An attention sees the future, or context changes with the total length.
    """
    trial = _Trial(analysis)
    proof = Proof(lengths=trial.lengths)
    signatures = Signatures(analysis)
    looked_at: dict[int, Seen] = {}
    for layer, head in enumerate(analysis.heads):
        how = signatures.of(head)
        if how not in looked_at:
            looked_at[how] = trial.attention(layer, head)
        proof.seen[layer] = looked_at[how]
    proof.limit = trial.context()
    return proof


class _Trial:
    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.flow = analysis.flow
        self.fixed = analysis.length if isinstance(analysis.length, int) else None
        self.opsets = dict(analysis.model.graph.opset_imports)
        self.limit = min(self.flow.shapes.bounds, default=FAR)
        self.lengths = (self.fixed,) if self.fixed is not None else self._lengths()

    def _lengths(self) -> tuple[int, ...]:
        """Lengths on either side of every number that context compares something with."""
        found = {min(SHORT, self.limit), min(LONG, self.limit)}
        for node in self.flow.order:
            if node.op_type not in _SWITCHES or self.flow.kinds.get(node.outputs[0]) is not Kind.CONTEXT:
                continue
            for value in node.inputs:
                number = small_constant(value)
                if number is None or number.size != 1:
                    continue
                size = abs(float(number.reshape(-1)[0]))
                if 2 <= size < FAR and size == int(size):
                    found |= {int(size) + beside for beside in (-1, 0, 1, 3)}
        return tuple(sorted(length for length in found if 2 <= length <= self.limit))

    def experiment(self, outputs: Sequence[ir.Value], head: Head | None = None) -> Experiment:
        try:
            return Experiment(
                flow=self.flow, inputs=self.analysis.inputs, opsets=self.opsets, outputs=outputs,
                stand_ins=frozenset() if head is None else head.score_values,
                stops=frozenset() if head is None else head.ends,
            )  # fmt: skip
        except Refused:
            raise
        except Exception as error:
            raise _untried(outputs[0], error) from error

    def run(self, experiment: Experiment, length: int, mask: MaskFeed) -> list[np.ndarray]:
        try:
            return experiment.run(length, mask)
        except Exception as error:
            raise _untried(experiment.outputs[0], error) from error

    # (ii) causal

    def attention(self, layer: int, head: Head) -> Seen:
        """Look at the weights that an attention gives to keys."""
        if head.fused is not None:
            return self._fused(layer, head)
        product = head.products[0]
        weights = product.node.inputs[product.weights]
        assert weights is not None
        axes = self.flow.axes[weights]
        experiment = self.experiment([weights], head)
        return self._look(layer, head, experiment, lambda array, length: unfolded(array, axes, length))

    def _look(self, layer: int, head: Head, experiment: Experiment, read: Read) -> Seen:
        """Run scores into weights at several lengths and with several masks."""
        found: dict[int, np.ndarray] = {}
        for length in [length for length in self.lengths if length <= DENSE] or [min(self.lengths)]:
            found[length] = read(self.run(experiment, length, all_seen)[0], length)
            self._check_causal(layer, head, found[length])
            if found[length].size > 1 << 24:
                break
        longest = max(found)
        for length, weights in found.items():
            self._check_prefix(layer, head.at, found[longest][..., :length, :length], weights)
        padded = None
        if experiment.masks:
            padded = read(self.run(experiment, longest, left_padded)[0], longest)
            self._check_causal(layer, head, padded, first=2)
        if experiment.masks and self.fixed is not None:
            cut, half = read(self.run(experiment, longest, cut_short)[0], longest), longest // 2
            self._check_prefix(layer, head.at, found[longest][..., :half, :half], cut[..., :half, :half])
        flat = None
        if experiment.stand_ins:
            flat = read(experiment.run(longest, all_seen, flat=True)[0], longest)
        return Seen(weights=found[longest], padded=padded, flat=flat)

    def _fused(self, layer: int, head: Head) -> Seen:
        """A fused operator states its mask outright."""
        assert head.fused is not None
        node = head.fused.node
        mask = node.inputs[head.fused.mask] if head.fused.mask is not None else None
        if mask is None:
            if not head.fused.causal:
                raise _sees_future(layer, head, "no mask")
            length = max(length for length in self.lengths if length <= DENSE)
            return Seen(weights=np.tril(np.ones((length, length))))
        axes = self.flow.demands.get((node, head.fused.mask or 0), ())
        experiment = self.experiment([mask])
        return self._look(layer, head, experiment, lambda array, length: _allowed(array, axes, length, head))

    def _check_causal(self, layer: int, head: Head, weights: np.ndarray, first: int = 0) -> None:
        queries, keys = weights.shape[-2:]
        future = np.triu(np.ones((queries, keys), dtype=bool), 1)
        future[:first] = False
        seen = np.abs(np.where(future, weights, 0.0))
        if np.isnan(weights[..., first:, :]).any():
            raise Refused("attention weights are not numbers", layer=layer, at=head.at.name)
        if seen.max(initial=0.0) > SEEN:
            query, key = np.unravel_index(int(seen.argmax()), seen.shape)[-2:]
            raise _sees_future(layer, head, f"query {query} gives {seen.max():.2g} to key {key}")

    # (iii) prefix-stable

    def _check_prefix(self, layer: int | None, at: ir.Value, longer: np.ndarray, shorter: np.ndarray) -> None:
        if longer.shape == shorter.shape and close(longer, shorter):
            return
        raise Refused(
            "context changes with the number of tokens that follow, so what is remembered would grow stale",
            layer=layer, at=at.name, expected="the same value for a position at every total length",
            found=difference(longer, shorter), hint="frequencies or scales that depend on the total length",
        )  # fmt: skip

    def context(self) -> int | None:
        """Compare every context value that meets tokens at several lengths.

        Returns:
            The longest total length up to which all are stable; None where none changes at any length.
        """
        meetings = self._meetings()
        if not meetings:
            return None
        values = list(meetings)
        experiment = self.experiment(values)
        shorter: list[np.ndarray] = []
        previous = 0
        for length in self.lengths:
            arrays = self._arrays(experiment, meetings, length, all_seen)
            try:
                for value, array, short in zip(values, arrays, shorter, strict=bool(shorter)):
                    self._check_prefix(None, value, _first(array, meetings[value], previous), short)
            except Refused:
                if previous < USEFUL:
                    raise
                return previous
            shorter, previous = arrays, length
        if self.fixed is not None and experiment.masks:
            half, cut = self.fixed // 2, self._arrays(experiment, meetings, self.fixed, cut_short)
            for value, whole, array in zip(values, shorter, cut, strict=True):
                axes = meetings[value]
                self._check_prefix(None, value, _first(whole, axes, half), _first(array, axes, half))
        return None

    def _arrays(
        self, experiment: Experiment, meetings: dict[ir.Value, Axes], length: int, mask: MaskFeed
    ) -> list[np.ndarray]:
        arrays = self.run(experiment, length, mask)
        return [unfolded(array, axes, length) for axes, array in zip(meetings.values(), arrays, strict=True)]

    def _meetings(self) -> dict[ir.Value, Axes]:
        """Context that meets tokens outside the scores, with the axes that hold tokens."""
        inside = self._inside()
        found: dict[ir.Value, Axes] = {}
        for node in self.flow.order:
            if node in inside or not any(self.flow.kinds.get(value) is Kind.TOKEN for value in node.outputs):
                continue
            for index, value in enumerate(node.inputs):
                if value is None or self.flow.kinds.get(value) is not Kind.CONTEXT:
                    continue
                if self.flow.targets.get(node) == index or (node, index) in self.flow.parameters:
                    continue
                axes = self.flow.demands.get((node, index), ())
                value, axes = self._positions(self.analysis.same.get(value, value), axes)
                if axes or not self._is_fixed(value):
                    found.setdefault(value, axes)
        return found

    def _is_fixed(self, value: ir.Value) -> bool:
        numbers = self.flow.shapes[value].value
        return numbers is not None and not any(getattr(number, "free_symbols", ()) for number in numbers.reshape(-1))

    def _positions(self, value: ir.Value, axes: Axes) -> tuple[ir.Value, Axes]:
        """Rows of a table of weights are as stable as the positions that pick them."""
        node = value.producer()
        while node is not None and node.op_type in ("Gather", "Cast", "Identity"):
            source = node.inputs[0]
            if node.op_type != "Gather":
                if source is None or self.flow.kinds.get(source) is not Kind.CONTEXT:
                    break
                value, node = source, source.producer()
                continue
            tensor, picked = constant_tensor(source), node.inputs[1]
            axis = next(iter(node.attributes.values())).value if node.attributes else 0
            if tensor is None or picked is None or axis != 0 or self.flow.kinds.get(picked) is not Kind.CONTEXT:
                break
            rank = self.flow.shapes[picked].rank or 0
            if any(held.axis >= rank for held in axes):
                break
            return self.analysis.same.get(picked, picked), axes
        return value, axes

    def _inside(self) -> set[ir.Node]:
        """Nodes between scores and weights, which are looked at as a whole."""
        inside: set[ir.Node] = set()
        for head in self.analysis.heads:
            inside.update(node for value in downstream(head.score_values, head.ends) if (node := value.producer()))
        return inside


def _first(array: np.ndarray, axes: Axes, length: int) -> np.ndarray:
    """What an unfolded array says of the first tokens."""
    for place in range(1, len(axes) + 1):
        array = array.take(range(length), axis=-place)
    return array


def _allowed(mask: np.ndarray, axes: Axes, length: int, head: Head) -> np.ndarray:
    """The weights that a fused operator's mask allows."""
    array = np.broadcast_to(mask, (*mask.shape[:-2], length, length)) if len(axes) < 2 else unfolded(mask, axes, length)
    weights = array.astype(np.float64) if array.dtype == bool else np.exp(np.minimum(array.astype(np.float64), 0.0))
    causal = head.fused is not None and head.fused.causal
    return np.tril(weights) if causal else weights


def _sees_future(layer: int, head: Head, found: str) -> Refused:
    return Refused(
        "attention sees the future, so what is remembered of a token would depend on tokens after it",
        layer=layer, at=head.at.name, expected="no weight on keys after the query", found=found,
        hint="bidirectional and prefix models cannot have a cache",
    )  # fmt: skip


def _untried(value: ir.Value, error: Exception) -> Refused:
    return Refused(
        "context could not be run, so it cannot be shown to be causal and stable", at=value.name,
        found=" ".join(str(error).split())[:200],
    )  # fmt: skip
