"""What `config.json` says of a model's heads, and how it follows when a pass changes them.

Every family spells it in its own way: `num_key_value_heads`, `num_kv_heads`, `n_head_kv`, `kv_n_heads` inside
`attn_config`, `multi_query_group_num`, a flag `multi_query`, a list with a number for each layer. So keys are found by
the words that they are made of and the numbers that they hold.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

Config = dict[str, Any]

_CHANGES = "kvsurgeon.head_changes"
_NEW_KEY = "num_key_value_heads"  # what most families, and clients that size a cache, call it
_LAYERS_KEY = "num_key_value_layers"  # as the MLKV paper's configurations have it


@dataclass(frozen=True, kw_only=True)
class Heads:
    """How many heads the attention layers of a model have."""

    query: int
    kv: tuple[int, ...]  # of each attention layer
    kv_layers: int  # layers that have keys and values of their own


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a pass made of a model's heads."""

    before: Heads
    after: Heads


def remember_change(model: ir.Model, change: Change) -> None:
    """Have `config.json` follow a change of heads when the model is saved."""
    model.meta[_CHANGES] = (*changes_of(model), change)


def changes_of(model: ir.Model) -> tuple[Change, ...]:
    """Return how the heads of a model were changed since it was loaded, in order."""
    found: tuple[Change, ...] = model.meta.get(_CHANGES, ())
    return found


def followed(config: Config, changes: Sequence[Change], *, strict: bool = False) -> Config:
    """Return the config as it describes the model after these changes; the one given stays as it is.

    Args:
        config: What was read from a file.
        changes: What passes made of the heads.
        strict: Whether its reader takes no keys that it does not know, so that none may be added.

    >>> before, after = (Heads(query=9, kv=(kv, kv), kv_layers=2) for kv in (3, 9))
    >>> followed({"num_attention_heads": 9, "num_key_value_heads": 3}, [Change(before=before, after=after)])
    {'num_attention_heads': 9, 'num_key_value_heads': 9}
    """
    config = copy.deepcopy(config)
    for change in changes:
        if change.before.kv != change.after.kv:
            _follow_heads(config, change, strict=strict)
        if strict:
            continue
        if change.before.kv_layers != change.after.kv_layers or _LAYERS_KEY in config:
            _home(config, change.before)[_LAYERS_KEY] = change.after.kv_layers
    return config


def _follow_heads(config: Config, change: Change, *, strict: bool) -> None:
    """Write the new number wherever the old one stands; where it stands nowhere, wherever one of the kind stands."""
    before, after = change.before, change.after
    home = _home(config, before)
    keys = list(_found(home, before, _counts_kv_heads))
    telling = [(part, key) for part, key in keys if part[key] in (_spoken(before.kv), list(before.kv))]
    for part, key in telling or keys:
        part[key] = list(after.kv) if isinstance(part[key], list) else _spoken(after.kv)
    flags = list(_found(home, before, _is_multi_query_flag))
    for part, key in flags:
        part[key] = set(after.kv) == {1}
    if not strict and not keys and not (flags and set(after.kv) <= {1, after.query}):
        home[_NEW_KEY] = _spoken(after.kv)


def _spoken(counts: Sequence[int]) -> int | list[int]:
    """Return one number for all layers, or a list where they differ."""
    return counts[0] if len(set(counts)) == 1 else list(counts)


def _found(part: Config, heads: Heads, wanted: Callable[[frozenset[str], Any], bool]) -> Iterator[tuple[Config, str]]:
    """Yield the keys that are wanted, here and in parts inside that do not describe another model."""
    for key, value in list(part.items()):
        if isinstance(value, dict):
            if heads.query in (numbers := _query_heads(value)) or not numbers:
                yield from _found(value, heads, wanted)
        elif wanted(_words(key), value):
            yield part, key


def _words(key: str) -> frozenset[str]:
    return frozenset(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower().split("_"))


def _counts_kv_heads(words: frozenset[str], value: Any) -> bool:
    """Whether a key made of these words says how many key and value heads there are.

    >>> names = ["num_key_value_heads", "n_head_kv", "multi_query_group_num", "kv_channels", "num_kv_shared_layers"]
    >>> [_counts_kv_heads(_words(name), 2) for name in names]
    [True, True, True, False, False]
    """
    numbers = value if isinstance(value, list) and value else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        return False
    of_kv = "kv" in words or {"key", "value"} <= words
    return (of_kv and bool(words & {"head", "heads"})) or ("query" in words and bool(words & {"group", "groups"}))


def _is_multi_query_flag(words: frozenset[str], value: Any) -> bool:
    return isinstance(value, bool) and {"multi", "query"} <= words and "group" not in words


def _home(config: Config, heads: Heads) -> Config:
    """Return the part of the config that describes the decoder: itself, or one such as `text_config`."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return next((part for part in parts if heads.query in _query_heads(part)), config)


def _query_heads(part: Config) -> set[int]:
    """Return what this part says of the number of query heads: nothing, or one number, or several that may mean it."""
    return {
        value
        for words, value in ((_words(key), value) for key, value in part.items())
        if isinstance(value, int) and not isinstance(value, bool)
        if words & {"head", "heads"} and not words & {"kv", "key", "dim", "size"}
    }
