"""Cache signature: names, order, layout and element type of all cache inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint, bottlenecks, choose_cache_point
from kvsurgeon.analysis.token_data import upstream_tokens
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.cache.layout import Layout, possible_layouts
from kvsurgeon.cache.length_inputs import LengthInput, PastLength
from kvsurgeon.cache.pairs import UpdateMode
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.resizing.windows import Window, Windows, union

Kind = Literal["key", "value", "state", "conv_state", "recurrent_state", "key_scale", "value_scale"]

SCALE = "_scale"  # ends the kind and the names of the scales of quantized rows
QUANTIZED = {8: ir.DataType.INT8, 4: ir.DataType.UINT8}  # element type of quantized rows, by bits
_SCALED: dict[Kind | None, Kind] = {"key": "key_scale", "value": "value_scale"}


@dataclass(frozen=True, kw_only=True)
class SignatureEntry:
    """A cache input with its cache output, and the tensor of the graph that they cache.

    Attributes:
        past: Name of the input.
        present: Name of the output.
        dtype: Element type of both.
        shape: Declared dimensions of the input; None for one without a name.
        axis: Index of the sequence axis.
        rows: Name of the value with the new rows in the graph without the cache; of the zeros that replace a
            recurrent state.
        is_declared: Whether the schema of an operator calls the input a past, so that no attention has to read it.
        cache_mode: Content of the output: past and new rows, the updated buffer, new rows only, the last rows,
            or a recurrent state.
        operator: Operator that combines past and new rows; empty for a recurrent state.
        window: The rows of the input, if they are those of a window.
        layout: Meaning of each axis; None for a tensor with other axes. Set by `CacheSignature.located`.
        layer: Attention layer that reads it, counted in execution order among those with entries, or index of the
            sequence state. Set by `CacheSignature.located`.
        kind: "key", "value", or "state", "conv_state" or "recurrent_state" of a sequence state; "key_scale" or
            "value_scale" of the scales of quantized rows. Set by `CacheSignature.located`.
    """

    past: str
    present: str
    dtype: ir.DataType
    shape: tuple[int | str | None, ...]
    axis: int
    rows: str
    is_declared: bool
    cache_mode: UpdateMode
    operator: str
    window: Window | None = None
    layout: Layout | None = None
    layer: int | None = None
    kind: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class CacheSignature:
    """Cache inputs and outputs of a model.

    Attributes:
        entries: The cached tensors, and then the recurrent states, each in the order of the graph inputs.
        inputs: Names of all graph inputs, in order.
        outputs: Names of all graph outputs, in order.
        past_length: Source of the number of past tokens; None if several inputs give it.
        length_input: The input that gives it, if there is a separate one.
        capacity: Rows of a buffer, if fixed.
        windows: The rows that are cached, by the index of the attention site; all of other sites. Set by `located`.
    """

    entries: tuple[SignatureEntry, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    past_length: PastLength | None
    length_input: LengthInput | None
    capacity: int | None
    windows: Windows = field(default_factory=dict)

    def located(self, analysis: Analysis, layouts: Mapping[Kind, Layout] | None = None) -> CacheSignature:
        """Return the signature with layer, kind and layout of each entry, found by the attention that reads it.

        This also proves that it is a cache: the new rows lie between a projection and a product of attention, or
        feed a sequence state.

        Args:
            analysis: Analysis of the graph without the cache.
            layouts: Layouts of keys and of values from the metadata, for axes of equal size.

        Raises:
            UnsupportedError: Neither attention nor a sequence state reads an entry.
        """
        readers = _readers(analysis, Counter(entry.rows for entry in self.entries))
        recurrences = _recurrences(analysis)
        found = []
        windows: dict[ir.Value, Window | None] = {}  # by cache point
        for entry in self.entries:
            if entry.cache_mode == "recurrent":
                found.append(_located_state(entry, recurrences))
                continue
            if not readers.get(entry.rows) and not entry.is_declared:
                raise UnsupportedError(
                    "a cached tensor is neither a key nor a value of any attention, nor a sequence state",
                    code=Code.UNKNOWN_CACHE, at=entry.past, found=f"new rows `{entry.rows}`",
                )  # fmt: skip
            if readers.get(entry.rows):
                layer, kind, point = readers[entry.rows].pop(0)
                layout = _layout(entry, point, (layouts or {}).get("key" if kind == "key" else "value"))
                entry = replace(entry, layer=layer, kind=kind, layout=layout)
                windows[point.value] = entry.window
            found.append(entry)
        return replace(self, entries=tuple(found), windows=_windows_of_sites(analysis, windows))

    def quantized(self, bits: int) -> CacheSignature:
        """Return the located signature if keys and values were integers of some bits, each followed by its scales."""
        entries: list[SignatureEntry] = []
        scales: dict[str, str] = {}
        for entry in self.entries:
            if entry.kind not in _SCALED or not entry.dtype.is_floating_point():
                entries.append(entry)
                continue
            past, present = f"{entry.past}{SCALE}", f"{entry.present}{SCALE}"
            scales |= {entry.past: past, entry.present: present}
            scale = replace(entry, past=past, present=present, dtype=ir.DataType.FLOAT, kind=_SCALED[entry.kind])
            entries += [replace(entry, dtype=QUANTIZED[bits]), scale]
        inputs, outputs = (
            tuple(one for name in names for one in (name, scales.get(name)) if one is not None)
            for names in (self.inputs, self.outputs)
        )
        return replace(self, entries=tuple(entries), inputs=inputs, outputs=outputs)


def _windows_of_sites(analysis: Analysis, by_point: Mapping[ir.Value, Window | None]) -> Windows:
    """Return the window of each attention site whose cached tensors all have one, by its index."""
    found = {
        index: union([by_point.get(point.value) for kind, point in site.cached_tensors if kind != "state"])
        for index, site in enumerate(analysis.sites)
    }
    return {index: window for index, window in found.items() if window is not None}


def _recurrences(analysis: Analysis) -> dict[str, int]:
    """Return the numbers of the recurrent states by the names of the values that they start from."""
    found: dict[str, int] = {}
    for number, (_, recurrent) in enumerate(analysis.flow.recurrences):
        node, index = recurrent.start
        found |= {value.name or "": number for value in upstream([node.inputs[index]], inputs=content_inputs)}
    return found


def _located_state(entry: SignatureEntry, recurrences: Mapping[str, int]) -> SignatureEntry:
    """Return the entry of a recurrent state with the number of the recurrence that starts from it.

    Raises:
        UnsupportedError: None does.
    """
    if entry.rows not in recurrences:
        raise UnsupportedError(
            "no recurrence starts from a recurrent state", code=Code.UNKNOWN_CACHE, at=entry.past,
            found=f"zeros `{entry.rows}`",
        )  # fmt: skip
    return replace(entry, layer=recurrences[entry.rows], kind="recurrent_state")


def _layout(entry: SignatureEntry, point: CachePoint, noted: Layout | None) -> Layout | None:
    """Return the layout of an entry by the sizes of its axes: the one in the metadata, if possible."""
    batch = point.batch if isinstance(point.batch, int) else None
    possible = list(possible_layouts(entry.shape, entry.axis, batch=batch, heads=point.heads, head_dim=point.head_dim))
    return noted if noted in possible else next(iter(possible), None)


def _readers(analysis: Analysis, rows: Counter[str]) -> dict[str, list[tuple[int, Kind, CachePoint]]]:
    """Return layer, kind and cache point of the cached values by name, each as often as it is cached.

    Keys and values that share a tensor come first.
    """
    readers: dict[str, list[tuple[int, Kind, CachePoint]]] = {}

    def add(number: int, kind: Kind, place: Place, point: CachePoint) -> bool:
        """Add the cached values of which an operand is made; return whether one is new."""
        added = False
        node, index = analysis.flow.origin(place)
        value = node.inputs[index]
        assert value is not None
        # The cache point may be the common input of several projections, which is no bottleneck of one operand.
        candidates = {*bottlenecks(analysis.flow, [value]), *bottlenecks(analysis.flow, [point.value])}
        kinds = _kinds_of_quantized(analysis.flow, value, kind, rows) | {one.name or "": kind for one in candidates}
        for name in kinds.keys() & rows.keys():
            known = readers.setdefault(name, [])
            if len(known) < rows[name] and (number, kinds[name]) not in [reader[:2] for reader in known]:
                known.append((number, kinds[name], point))
                added = True
        return added

    flow, layer = analysis.flow, 0
    states = [(place, choose_cache_point(flow, place)) for state in flow.cached_states for place in state.places]
    for site in analysis.sites:
        parts: tuple[tuple[Kind, tuple[CachedOperand, ...]], ...] = (("key", site.keys), ("value", site.values))
        further = {point.value for kind, point in site.cached_tensors if kind == "state"}
        operands = [(kind, one.place, one.cache_point) for kind, found in parts for one in found]
        layer += any([add(layer, *operand) for operand in operands if operand[2].value not in further])
        states += [(place, point) for _, place, point in operands if point.value in further]
    numbers: Counter[Kind] = Counter()
    for place, point in states:
        kind: Kind = "state" if analysis.rows_of(point.value) is None else "conv_state"
        numbers[kind] += add(numbers[kind], kind, place, point)
    return readers


def _kinds_of_quantized(flow: TokenFlow, operand: ir.Value, kind: Kind, rows: Container[str]) -> dict[str, Kind]:
    """Return the kind of integers and scales that an operand is computed from, by name.

    They are no bottlenecks: both are computed from one tensor, and needed together. Rows that they are computed from
    are those of a state.
    """
    found = upstream_tokens(flow, operand, stop=lambda value: value.name in rows) if kind in _SCALED else ()
    dtypes = {value.name or "": flow.shapes[value].dtype for value in found}
    return {name: kind if dtype is not None and dtype.is_integer() else _SCALED[kind] for name, dtype in dtypes.items()}
