"""Cached tensors: what each caches, the names of its input and output, and its layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_flow import RecurrentState
from kvsurgeon.cache.layout import DEFAULT_LAYOUT, Layout
from kvsurgeon.cache.signature import QUANTIZED, SCALE
from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.resizing.windows import NO_WINDOWS, Window, Windows, union
from kvsurgeon.rewrite.cache_layouts import Order
from kvsurgeon.rewrite.cache_options import CacheOptions
from kvsurgeon.symbolic.dim_names import DimNames, dim_names
from kvsurgeon.symbolic.dimension import BATCH, Dimension

KeptRows = Window | int  # of a window, or the last ones of a state


@dataclass(frozen=True, kw_only=True)
class CacheTensor:
    """One cached tensor.

    Attributes:
        point: The tensor of the graph that is cached.
        past: Name of the cache input.
        present: Name of the cache output.
        is_key: Whether it caches keys.
        state_rows: Number of last rows of a state that are enough: all inputs and outputs have as many.
        window: The rows of a window that are cached, as far as the text has them.
        layout: Order of its axes.
        dtype: Element type of the cache, which may differ from that of the tensor.
        bits: Bits of an integer, if rows are quantized; two integers of 4 bits are one element.
        is_scale: Whether it holds the scales of the rows of a quantized tensor.
    """

    point: CachePoint
    past: str
    present: str
    is_key: bool
    layout: Layout
    dtype: ir.DataType
    state_rows: int | None = None
    bits: int | None = None
    is_scale: bool = False
    window: Window | None = None

    @property
    def kept(self) -> KeptRows | None:
        """The rows that are cached, if not all are."""
        return self.window or self.state_rows

    @property
    def width(self) -> int:
        """Number of elements of one row of one head."""
        return 1 if self.is_scale else self.point.head_dim * (self.bits or 8) // 8

    @property
    def scale(self) -> CacheTensor:
        """The scales of a quantized tensor."""
        past, present = (f"{name}{SCALE}" for name in (self.past, self.present))
        return replace(self, past=past, present=present, dtype=ir.DataType.FLOAT, bits=None, is_scale=True)

    @property
    def axis(self) -> int:
        """Index of the sequence axis."""
        return self.layout.index("sequence")

    @property
    def order(self) -> Order:
        """The layout as indices in [batch, kv_heads, sequence, head_dim]."""
        return tuple(DEFAULT_LAYOUT.index(axis) for axis in self.layout)

    def sizes(self, rows: Dimension) -> list[Dimension]:
        """Return the dimensions with a number of rows, unless only some are cached."""
        if self.kept is not None:
            rows = self.kept if isinstance(self.kept, int) else self.kept.extent
        batch = self.point.batch if isinstance(self.point.batch, int) else BATCH
        sizes: list[Dimension] = [batch, self.point.heads, rows, self.width]
        return [sizes[index] for index in self.order]

    def shape(self, rows: Dimension) -> DimNames:
        """Return the dimensions with a number of rows, as declared in the model."""
        return dim_names(self.sizes(rows))


@dataclass(frozen=True, kw_only=True)
class RecurrentTensor:
    """A state of fixed size that a region of the graph passes from token to token.

    Attributes:
        recurrent: The state in the graph.
        past: Name of the input.
        present: Name of the output.
        dtype: Element type.
    """

    recurrent: RecurrentState
    past: str
    present: str
    dtype: ir.DataType

    @property
    def shape(self) -> DimNames:
        """The dimensions as declared in the model."""
        return dim_names(self.recurrent.sizes)


def find_recurrent_tensors(analysis: Analysis, options: CacheOptions) -> list[RecurrentTensor]:
    """Return the recurrent states in execution order, with the names of their inputs and outputs."""
    found = enumerate((recurrent for _, recurrent in analysis.flow.recurrences), start=options.first_layer)
    return [
        RecurrentTensor(
            recurrent=recurrent, past=_filled(options.past, number, "recurrent_state"),
            present=_filled(options.present, number, "recurrent_state"),
            dtype=analysis.flow.shapes[recurrent.value].dtype or ir.DataType.FLOAT,
        )
        for number, recurrent in found
    ]  # fmt: skip


def find_cache_tensors(
    analysis: Analysis, options: CacheOptions, bits: int | None = None, windows: Windows = NO_WINDOWS
) -> list[CacheTensor]:
    """Return the tensors to cache, each once: key 0, value 0, key 1, ..., and then the states, numbered by kind.

    A state of which the last rows are enough is a conv_state.

    Args:
        analysis: Analysis of the model without a cache.
        options: Options of the cache.
        bits: Bits of an integer, if keys and values are quantized.
        windows: The rows that are cached, by the index of the attention site; all of other sites.

    Raises:
        UsageError: A name template does not give unique names.
        UnsupportedError: Rows cannot be quantized to that number of bits.
    """
    tensors: list[CacheTensor] = []
    kept = _windows_of_tensors(analysis, windows)
    cached: set[ir.Value] = set()
    layer = options.first_layer
    for site in analysis.sites:
        new = [(kind, point) for kind, point in site.cached_tensors if kind != "state" and point.value not in cached]
        cached |= {point.value for _, point in new}
        made = [_tensor(point, layer, kind, options) for kind, point in new]
        made = [replace(one, window=kept[one.point.value]) for one in made]
        tensors += made if bits is None else [_quantized(tensor, bits) for tensor in made]
        layer += bool(new)
    rows = {point.value: analysis.rows_of(point.value) for point in analysis.cached_states}
    for kind in ("state", "conv_state"):
        points = [one for one in analysis.cached_states if (rows[one.value] is None) is (kind == "state")]
        numbered = enumerate(points, start=options.first_layer)
        tensors += [
            replace(_tensor(one, number, kind, options), state_rows=rows[one.value]) for number, one in numbered
        ]
    names = [name for tensor in with_scales(tensors) for name in (tensor.past, tensor.present)]
    if len(set(names)) < len(names):
        raise UsageError("expected names that contain {layer} and {kind}, so that each is unique")
    return tensors


def _windows_of_tensors(analysis: Analysis, windows: Windows) -> dict[ir.Value, Window | None]:
    """Return the window that has all rows that the readers of a cached tensor need; None for all rows."""
    needed: dict[ir.Value, list[Window | None]] = {}
    for index, site in enumerate(analysis.sites):
        for _, point in site.cached_tensors:
            needed.setdefault(point.value, []).append(windows.get(index))
    return {value: union(found) for value, found in needed.items()}


def with_scales(tensors: Iterable[CacheTensor]) -> Iterator[CacheTensor]:
    """Yield the tensors, each quantized one before its scales."""
    for tensor in tensors:
        yield from (tensor,) if tensor.bits is None else (tensor, tensor.scale)


def _quantized(tensor: CacheTensor, bits: int) -> CacheTensor:
    """Return a tensor with quantized rows; it is unchanged if it has integers already.

    Raises:
        UnsupportedError: The number of features is odd, so that two integers of 4 bits would not fill each byte.
    """
    if not tensor.point.dtype.is_floating_point():
        return tensor
    if tensor.point.head_dim * bits % 8:
        raise UnsupportedError(
            f"a row cannot be stored as integers of {bits} bits", code=Code.NO_CACHE_POINT, at=tensor.point.value.name,
            expected="an even number of features of one head", found=str(tensor.point.head_dim), hint="use bits=8",
        )  # fmt: skip
    return replace(tensor, bits=bits, dtype=QUANTIZED[bits])


def _tensor(point: CachePoint, layer: int, kind: str, options: CacheOptions) -> CacheTensor:
    is_cast = options.cache_dtype is not None and point.dtype.is_floating_point()
    return CacheTensor(
        point=point,
        past=_filled(options.past, layer, kind),
        present=_filled(options.present, layer, kind),
        is_key=kind == "key",
        layout=options.key_layout if kind == "key" else options.value_layout,
        dtype=ir.DataType[str(options.cache_dtype).upper()] if is_cast else point.dtype,
    )


def _filled(template: str, layer: int, kind: str) -> str:
    try:
        return template.format(layer=layer, kind=kind)
    except (KeyError, ValueError, IndexError) as error:
        raise UsageError(f"expected a name such as past.{{layer}}.{{kind}}, found {template!r}") from error
