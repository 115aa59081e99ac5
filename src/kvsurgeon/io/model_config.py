"""Update the head counts in `config.json` after a pass has changed them.

Model families use different keys: `num_key_value_heads`, `num_kv_heads`, `n_head_kv`, `kv_n_heads` in `attn_config`,
`multi_query_group_num`, a flag `multi_query`, or a list with one number per layer. So keys are found by the words in
their name and by their value.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

Config = dict[str, Any]

_CHANGES = "kvsurgeon.head_changes"
_NEW_KEY = "num_key_value_heads"  # the key of most families, and of clients that allocate a cache
_LAYERS_KEY = "num_key_value_layers"  # the key of the MLKV paper


@dataclass(frozen=True, kw_only=True)
class ModelHeads:
    """The head counts of a model.

    Attributes:
        query: Number of query heads of each layer.
        kv: Number of KV heads of each attention layer.
        kv_layers: Number of layers that compute keys and values.
    """

    query: int
    kv: tuple[int, ...]
    kv_layers: int


HeadChange = tuple[ModelHeads, ModelHeads]  # before and after a pass


def longest_text(config: Mapping[str, Any]) -> int | None:
    """Return the longest text in tokens that a config states; None if it states none."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    return min((size for name in names if isinstance(size := config.get(name), int) and size > 0), default=None)


def record_head_change(model: ir.Model, change: HeadChange) -> None:
    """Record that a pass changed head counts, so that `save` updates `config.json`."""
    model.meta[_CHANGES] = (*head_changes(model), change)


def head_changes(model: ir.Model) -> tuple[HeadChange, ...]:
    """Return the changes of head counts since the model was loaded, in order."""
    changes: tuple[HeadChange, ...] = model.meta.get(_CHANGES, ())
    return changes


def updated_config(config: Config, changes: Sequence[HeadChange], *, strict: bool = False) -> Config:
    """Return a copy of a config that describes the model after these changes.

    Args:
        config: The content of the file.
        changes: The changes of head counts.
        strict: Whether no keys may be added, because the reader of the file rejects unknown ones.

    >>> before, after = (ModelHeads(query=9, kv=(kv, kv), kv_layers=2) for kv in (3, 9))
    >>> updated_config({"num_attention_heads": 9, "num_key_value_heads": 3}, [(before, after)])
    {'num_attention_heads': 9, 'num_key_value_heads': 9}
    """
    config = copy.deepcopy(config)
    for before, after in changes:
        if before.kv != after.kv:
            _update_kv_heads(config, before, after, strict=strict)
        if not strict and (before.kv_layers != after.kv_layers or _LAYERS_KEY in config):
            _decoder_part(config, before)[_LAYERS_KEY] = after.kv_layers
    return config


def _update_kv_heads(config: Config, before: ModelHeads, after: ModelHeads, *, strict: bool) -> None:
    """Write the new number to each key with the old one; if there is none, to each key for KV heads."""
    part = _decoder_part(config, before)
    keys = list(_find_keys(part, before, _is_kv_heads))
    current = [(inner, key) for inner, key in keys if inner[key] in (_as_config(before.kv), list(before.kv))]
    for inner, key in current or keys:
        inner[key] = list(after.kv) if isinstance(inner[key], list) else _as_config(after.kv)
    flags = list(_find_keys(part, before, _is_multi_query_flag))
    for inner, key in flags:
        inner[key] = set(after.kv) == {1}
    if not strict and not keys and not (flags and set(after.kv) <= {1, after.query}):
        part[_NEW_KEY] = _as_config(after.kv)


def _as_config(counts: Sequence[int]) -> int | list[int]:
    """Return one number for all layers, or a list if they differ."""
    return counts[0] if len(set(counts)) == 1 else list(counts)


def _find_keys(
    part: Config, heads: ModelHeads, matches: Callable[[frozenset[str], Any], bool]
) -> Iterator[tuple[Config, str]]:
    """Yield matching keys of a part of the config, and of inner parts that do not describe another model."""
    for key, value in list(part.items()):
        if isinstance(value, dict):
            if heads.query in (numbers := _query_heads(value)) or not numbers:
                yield from _find_keys(value, heads, matches)
        elif matches(_words(key), value):
            yield part, key


def _words(key: str) -> frozenset[str]:
    return frozenset(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower().split("_"))


def _is_kv_heads(words: frozenset[str], value: Any) -> bool:
    """Return whether a key of these words is a number of KV heads.

    >>> names = ["num_key_value_heads", "n_head_kv", "multi_query_group_num", "kv_channels", "num_kv_shared_layers"]
    >>> [_is_kv_heads(_words(name), 2) for name in names]
    [True, True, True, False, False]
    """
    numbers = value if isinstance(value, list) and value else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        return False
    of_kv = "kv" in words or {"key", "value"} <= words
    return (of_kv and bool(words & {"head", "heads"})) or ("query" in words and bool(words & {"group", "groups"}))


def _is_multi_query_flag(words: frozenset[str], value: Any) -> bool:
    return isinstance(value, bool) and {"multi", "query"} <= words and "group" not in words


def _decoder_part(config: Config, heads: ModelHeads) -> Config:
    """Return the part of a config that describes the decoder: the config itself, or a part such as `text_config`."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return next((part for part in parts if heads.query in _query_heads(part)), config)


def _query_heads(part: Config) -> set[int]:
    """Return the numbers in a part of a config that can be a number of query heads."""
    return {
        value
        for words, value in ((_words(key), value) for key, value in part.items())
        if isinstance(value, int) and not isinstance(value, bool)
        if words & {"head", "heads"} and not words & {"kv", "key", "dim", "size"}
    }
