"""What a client sees of a model that has a cache: its interface, its operators, and what its config says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from kvsurgeon.anatomy import Decoder
from kvsurgeon.io.data_file import weights_to_write
from kvsurgeon.io.external_data import external_tensors
from kvsurgeon.passes.cache.inject import Inject

Operator = tuple[str, str]  # domain ("" is ONNX's own) and type
KINDS = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output, as the file declares it."""

    name: str
    dtype: str  # as numpy or ml_dtypes spells it
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """What one layer remembers."""

    layer: int
    kind: str  # "key" or "value"
    past: Tensor
    present: Tensor


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model with a cache, as far as its client is concerned.

    Attributes:
        inputs: What it is given beside the cache.
        outputs: What it returns beside the cache.
        cache: What it remembers, in the order of its inputs.
        opset: Version of ONNX's own operators.
        operators: Every operator that stands in it, functions and subgraphs included, with one output of it.
        decoder: What was found in the model before it had a cache; None where it came with one.
        config: What its config.json says; empty where it has none.
        data_files: Files of external data that lie beside it.
        metadata: What passes noted in the file for hosts.
        beside: What the source has under the names of the target's side files, as far as it is JSON.
        room: Tokens that a text may have at the target; None where the client asks for no such number.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    cache: tuple[CacheEntry, ...]
    opset: int
    operators: Mapping[Operator, str]
    decoder: Decoder | None
    config: Mapping[str, Any]
    data_files: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    room: int | None = None

    @property
    def layers(self) -> int:
        """Layers that remember something of their own."""
        return len({entry.layer for entry in self.cache})

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Heads that the caches hold, each number once."""
        return self._sizes(1)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Features of a head that the caches hold, each number once."""
        return self._sizes(3)

    @property
    def query_heads(self) -> int | None:
        """Heads of the queries: as the config has them, else as the graph does; None where nobody says."""
        said = self.config.get("num_attention_heads", self.config.get("n_head"))
        found = None if self.decoder is None else max(one.query_heads for one in self.decoder.attentions)
        return said if isinstance(said, int) else found

    @property
    def vocabulary(self) -> int | None:
        """Width of the logits, where it is a number."""
        logits = self.output("logits")
        width = logits.dims[-1] if logits is not None and logits.dims else None
        return width if isinstance(width, int) else None

    @property
    def max_length(self) -> int | None:
        """The longest text: as far as the graph's own tables go, else as far as the config does."""
        bound = None if self.decoder is None else self.decoder.max_length
        said = (self.config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"))
        lengths = [length for length in (bound, *said) if isinstance(length, int) and length > 0]
        return min(lengths, default=None)

    def input(self, name: str) -> Tensor | None:
        """Return the input of that name."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    def output(self, name: str) -> Tensor | None:
        """Return the output of that name."""
        return next((tensor for tensor in self.outputs if tensor.name == name), None)

    def _sizes(self, axis: int) -> tuple[int, ...]:
        found = (entry.past.dims[axis] for entry in self.cache if len(entry.past.dims) > axis)
        return tuple(dict.fromkeys(size for size in found if isinstance(size, int)))


def facts_of(
    model: ir.Model,
    cache: Inject,
    *,
    decoder: Decoder | None = None,
    config: Mapping[str, Any] | None = None,
    room: int | None = None,
) -> Facts:
    """Return what a client sees of `model`, whose cache is named as `cache` says."""
    entries = tuple(_entries(model, cache))
    pasts = {entry.past.name for entry in entries}
    presents = {entry.present.name for entry in entries}
    return Facts(
        inputs=tuple(_tensor(value) for value in model.graph.inputs if value.name not in pasts),
        outputs=tuple(_tensor(value) for value in model.graph.outputs if value.name not in presents),
        cache=entries,
        opset=model.graph.opset_imports.get("", 1),
        operators={(node.domain, node.op_type): node.outputs[0].name or "" for node in reversed(list(_nodes(model)))},
        decoder=decoder,
        config=config or {},
        data_files=_data_files(model),
        metadata=dict(model.metadata_props),
        room=room,
    )


def _entries(model: ir.Model, cache: Inject) -> Iterator[CacheEntry]:
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    for layer in range(len(inputs)):
        for kind in KINDS:
            past, present = (text.format(layer=layer, kind=kind) for text in (cache.past, cache.present))
            if past in inputs and present in outputs:
                yield CacheEntry(layer=layer, kind=kind, past=_tensor(inputs[past]), present=_tensor(outputs[present]))


def _data_files(model: ir.Model) -> int:
    """Return how many files of external data `save` will make: those that stay, and one for what leaves."""
    moved = weights_to_write([model], pack=False)
    gone = {id(value.const_value) for value in moved}
    staying = {str(tensor.location) for tensor in external_tensors(model) if id(tensor) not in gone}
    return len(staying) + bool(moved)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _tensor(value: ir.Value) -> Tensor:
    dims = () if value.shape is None else tuple(value.shape)
    return Tensor(
        name=value.name or "",
        dtype="unknown" if value.dtype is None else str(value.dtype.numpy()),
        dims=tuple(dim if isinstance(dim, int) else dim.value for dim in dims),
    )
