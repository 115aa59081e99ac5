"""Facts about a decoder: frozen dataclasses without references into the graph.

Dimensions have the names of ``docs/glossary.md``. Every other name is that of a value or an initializer in the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvsurgeon.cache.pairs import UpdateMode
from kvsurgeon.cache.signature import Kind

MaskKind = Literal["causal", "sliding-window", "chunked", "other"]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The keys that a query attends to, measured by running the mask.

    Attributes:
        kind: Shape of the mask.
        window: Keys that a query attends to in a sliding window, its own position included.
        chunk: Positions in one chunk of a chunked mask.
        padding: Whether an input such as `attention_mask` masks padding.
        bias: Whether a finite bias that depends on the position is added to the scores (ALiBi, T5).
        block: Whether an input may let tokens of the first call attend to later ones of that call.
    """

    kind: MaskKind
    window: int | None = None
    chunk: int | None = None
    padding: bool = False
    bias: bool = False
    block: bool = False


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The weights that compute one of query, key and value from the hidden state.

    Attributes:
        initializers: Names of the weights in execution order, biases and quantization parameters included.
        output: Name of the product's output.
        fused: Whether the product computes several of query, key and value (fused QKV projection).
    """

    initializers: tuple[str, ...]
    output: str
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class CachePointFacts:
    """A tensor that a KV cache stores: only the rows of new tokens are computed.

    Attributes:
        value: Name of the tensor.
        dtype: Element type, as numpy or ml_dtypes names it: "float32", "bfloat16", "uint8".
        layout: Names of the cache's axes.
        heads: Number of key or value heads.
        head_dim: Features of one head.
        bytes_per_token: Bytes of one token of one sequence.
        rows: Number of tokens that it stores, if that are the last ones alone.
    """

    value: str
    dtype: str
    layout: tuple[str, ...]
    heads: int
    head_dim: int
    bytes_per_token: int
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention layer: `softmax(query @ key^T) @ value`, as one operator or as many.

    Attributes:
        layer: Index of the layer in execution order.
        output: Name of the context product's output.
        scores: Name of the score product's output.
        query_heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Features of one query or key head.
        value_head_dim: Features of one value head.
        scale: Factor of the scores; None if it is not constant.
        softcap: Bound of the scores, if `tanh` limits them.
        mask: The attention mask.
        rotary_dim: Features of a key head that rotary embedding rotates; None without rotary embedding.
        head_repetition: Names of the values at which key and value heads are repeated for the query heads.
        query: Projection of the queries; None if the operand is the hidden state.
        key: Projection of the keys.
        value: Projection of the values.
        key_cache: The tensor that a cache stores for the keys.
        value_cache: The tensor that a cache stores for the values.
        shares_cache_with: Index of an earlier layer whose cached tensors this layer reads.
    """

    layer: int
    output: str
    scores: str
    query_heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    scale: float | None
    softcap: float | None
    mask: Mask
    rotary_dim: int | None
    head_repetition: tuple[str, ...]
    query: Projection | None
    key: Projection | None
    value: Projection | None
    key_cache: CachePointFacts
    value_cache: CachePointFacts
    shares_cache_with: int | None = None


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """One attention to keys that are the same in every call, such as those of an encoder's output.

    Attributes:
        layer: Index among these layers in execution order.
        output: Name of the context product's output.
        scores: Name of the score product's output.
        inputs: Names of the inputs that keys and values are computed from.
        key_length: Number of keys, or the name of the dimension.
        kv_heads: Number of key and value heads; None if the graph has no axis of heads.
        head_dim: Features of one key head; None without an axis of heads.
        key: Name of the tensor of keys, with an axis of heads.
        value: Name of the tensor of values, with an axis of heads.
        kind: The kind of attention.
    """

    layer: int
    output: str
    scores: str
    inputs: tuple[str, ...]
    key_length: str | int
    kv_heads: int | None
    head_dim: int | None
    key: str | None
    value: str | None
    kind: Literal["cross"] = "cross"


@dataclass(frozen=True, kw_only=True)
class Input:
    """A graph input, in the model and at a decode step.

    Attributes:
        name: Name of the input.
        dtype: Element type, as numpy or ml_dtypes names it.
        shape: Shape in the model.
        decode_shape: Shape with a cache, with `sequence_length` new tokens and `total_sequence_length` in all.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    decode_shape: tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class CachedTensor:
    """One past input of a model that has a cache, with its present output.

    Attributes:
        past: Name of the input.
        present: Name of the output.
        layer: Index of the layer that reads it among the layers with their own cache entry; the index of a state.
        kind: What it stores.
        dtype: Element type, as numpy or ml_dtypes names it.
        shape: Shape of the past, as the model declares it.
        cache_mode: Whether the output contains past and new rows, is the updated buffer, or has the new rows only.
        operator: Operator that combines past and new rows.
        past_length: Name of the input that gives the number of past tokens, or of the positions whose first is that
            number; None if the shape of the past or a mask gives it.
    """

    past: str
    present: str
    layer: int
    kind: Kind
    dtype: str
    shape: tuple[str | int, ...]
    cache_mode: UpdateMode
    operator: str
    past_length: str | None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A causal decoder. For a model with a cache, all but `cache` describes the first call, with an empty cache.

    Attributes:
        attentions: Attention layers in execution order, cross-attention excluded.
        inputs: Graph inputs without those of a cache.
        opset: Version of the default operator set.
        max_length: Largest total sequence length that position tables in the graph allow.
        proved: Proved properties, as sentences.
        assumed: Assumed properties, as sentences.
        states: Tensors that a cache stores besides keys and values: for convolutions and token shifts, or for attention
            that reads more of all tokens, such as a second product of scores.
        cache: Cached tensors in the order of the graph's inputs; empty without a cache.
        cross_attentions: Attention to keys that are the same in every call, in execution order.
    """

    attentions: tuple[Attention, ...]
    inputs: tuple[Input, ...]
    opset: int
    max_length: int | None
    proved: tuple[str, ...]
    assumed: tuple[str, ...]
    states: tuple[CachePointFacts, ...] = ()
    cache: tuple[CachedTensor, ...] = ()
    cross_attentions: tuple[CrossAttention, ...] = ()

    def __repr__(self) -> str:
        """Return the number of layers and the size of the cache."""
        cached = "with a cache" if self.cache else "without a cache"
        return f"Decoder({len(self.attentions)} layers, {cached}, {self.cache_bytes_per_token} bytes per token)"

    @property
    def cache_entries(self) -> int:
        """Number of (key, value) pairs in the cache; less than the number of layers if layers share them."""
        return sum(attention.shares_cache_with is None for attention in self.attentions)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one more token of one sequence adds to the cache."""
        owners = [attention for attention in self.attentions if attention.shares_cache_with is None]
        points = [point for attention in owners for point in (attention.key_cache, attention.value_cache)]
        return sum(point.bytes_per_token for point in (*points, *self.states) if point.rows is None)
