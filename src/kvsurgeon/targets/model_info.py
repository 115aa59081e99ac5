"""The facts about a model with a cache that targets check and write into side files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from kvsurgeon.anatomy import Decoder
from kvsurgeon.cache.states import find_states
from kvsurgeon.io.data_file import weights_to_write
from kvsurgeon.io.external_data import external_tensors
from kvsurgeon.io.model_config import longest_text
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.separate_cross_attention import SeparateCrossAttention

Operator = tuple[str, str]  # domain ("" for ONNX's own) and type


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """An input or output as the file declares it.

    Attributes:
        name: Its name.
        dtype: Element type, as numpy or ml_dtypes name it.
        dims: Size, symbol or None for each axis.
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True, kw_only=True)
class CachePairInfo:
    """A past input and its present output.

    Attributes:
        layer: Layer number in their names.
        kind: "key" or "value", or of a state "conv_state" or "recurrent_state".
        past: The input.
        present: The output.
    """

    layer: int
    kind: str
    past: TensorInfo
    present: TensorInfo


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model with a cache, as its client sees it.

    Attributes:
        inputs: The inputs other than the cache.
        outputs: The outputs other than the cache.
        cache: The keys and values of the cache, in the order of its layers.
        states: The states of a fixed size.
        cross_attention: The inputs of keys and values of cross-attention, in the order of their layers.
        opset: Opset version of ONNX's own operators.
        operators: Every operator of the model, functions and subgraphs included, with the name of one output.
        decoder: The facts about the model before injection; None if they are not known.
        config: The contents of `config.json`; empty if there is none.
        data_files: Number of external data files.
        graph: The graph; None if it is not known.
        metadata: The metadata of the model.
        source_files: Contents of the source's files that the side files of the target replace, if JSON objects.
        chat_template: The chat template in a file of the source; None if there is none.
        token_limit: Number of tokens that a text may have at the target; None if the target has no such limit.
        parts: The further models, which compute inputs of the decoder, by the names that they have next to it.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    cache: tuple[CachePairInfo, ...]
    states: tuple[CachePairInfo, ...] = ()
    cross_attention: tuple[TensorInfo, ...] = ()
    opset: int
    operators: Mapping[Operator, str]
    decoder: Decoder | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    data_files: int = 0
    graph: ir.Graph | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    source_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chat_template: str | None = None
    token_limit: int | None = None
    parts: Mapping[str, ModelInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ir.Model, cache: Inject, **facts: Any) -> ModelInfo:
        """Return the facts about `model`.

        Args:
            model: The model.
            cache: The pass that named its cache.
            **facts: The fields that the model does not give: decoder, config, source_files, chat_template, token_limit
                and parts.
        """
        pairs, states = tuple(_cache_pairs(model, cache.of_decoder)), tuple(_states(model))
        given = dict(_cross_attention(model))
        in_cache = {tensor.name for pair in (*pairs, *states) for tensor in (pair.past, pair.present)} | {
            name for past, present in given.items() for name in (past.name, present)
        }
        nodes = [*model.graph.all_nodes(), *(node for one in model.functions.values() for node in one.all_nodes())]
        return cls(
            inputs=tuple(_tensor(value) for value in model.graph.inputs if value.name not in in_cache),
            outputs=tuple(_tensor(value) for value in model.graph.outputs if value.name not in in_cache),
            cache=pairs,
            states=states,
            cross_attention=tuple(given),
            opset=model.graph.opset_imports.get("", 1),
            operators={(node.domain, node.op_type): node.outputs[0].name or "" for node in reversed(nodes)},
            data_files=_data_files(model),
            graph=model.graph,
            metadata=dict(model.metadata_props),
            **facts,
        )

    @property
    def layers(self) -> int:
        """Number of layers with a separate cache."""
        return len({pair.layer for pair in self.cache})

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """The numbers of KV heads of the caches, without repetition."""
        return self._cache_sizes(1)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The head dimensions of the caches, without repetition."""
        return self._cache_sizes(3)

    @property
    def query_heads(self) -> int | None:
        """Number of query heads, by the config or else by the graph; None if neither gives it."""
        configured = self.config.get("num_attention_heads", self.config.get("n_head"))
        layers = () if self.decoder is None else self.decoder.attentions
        found = max((one.query_heads for one in layers), default=None)
        return configured if isinstance(configured, int) else found

    @property
    def vocab_size(self) -> int | None:
        """Size of the last axis of the logits; None if it is not fixed."""
        logits = self.output("logits")
        size = logits.dims[-1] if logits is not None and logits.dims else None
        return size if isinstance(size, int) else None

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens that the tables of the graph and the config allow; None if neither limits it."""
        of_graph = None if self.decoder is None else self.decoder.max_length
        return min((length for length in (of_graph, longest_text(self.config)) if length is not None), default=None)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs other than the cache."""
        return tuple(tensor.name for tensor in self.inputs)

    def input(self, name: str) -> TensorInfo | None:
        """Return the input of that name, which is none of the cache."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    def output(self, name: str) -> TensorInfo | None:
        """Return the output of that name."""
        return next((tensor for tensor in self.outputs if tensor.name == name), None)

    def _cache_sizes(self, axis: int) -> tuple[int, ...]:
        sizes = (pair.past.dims[axis] for pair in self.cache if len(pair.past.dims) > axis)
        return tuple(dict.fromkeys(size for size in sizes if isinstance(size, int)))


def _cache_pairs(model: ir.Model, cache: Inject) -> Iterator[CachePairInfo]:
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    for layer in range(len(inputs)):
        for kind in ("key", "value"):
            past, present = (template.format(layer=layer, kind=kind) for template in (cache.past, cache.present))
            if past in inputs and present in outputs:
                pair = _tensor(inputs[past]), _tensor(outputs[present])
                yield CachePairInfo(layer=layer, kind=kind, past=pair[0], present=pair[1])


def _states(model: ir.Model) -> Iterator[CachePairInfo]:
    for state in find_states(model.graph):
        past, present = _tensor(state.past), _tensor(state.present)
        number = re.search(r"\d+", past.name)
        yield CachePairInfo(layer=int(number.group()) if number else 0, kind=state.kind, past=past, present=present)


def _cross_attention(model: ir.Model) -> Iterator[tuple[TensorInfo, str]]:
    """Yield the inputs of keys and values of cross-attention, with the names of the outputs that return them."""
    names = SeparateCrossAttention()
    inputs = {value.name: value for value in model.graph.inputs}
    for layer, kind in itertools.product(range(len(inputs)), ("key", "value")):
        past, present = (template.format(layer=layer, kind=kind) for template in (names.past, names.present))
        if past in inputs:
            yield _tensor(inputs[past]), present


def _data_files(model: ir.Model) -> int:
    """Return the number of external data files that `save` will write: existing ones, and one for moved weights."""
    moved = weights_to_write([model], pack=False)
    moved_tensors = {id(value.const_value) for value in moved}
    staying = {str(tensor.location) for tensor in external_tensors(model) if id(tensor) not in moved_tensors}
    return len(staying) + bool(moved)


def _tensor(value: ir.Value) -> TensorInfo:
    return TensorInfo(
        name=value.name or "",
        dtype="unknown" if value.dtype is None else str(value.dtype.numpy()),
        dims=tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ()),
    )
