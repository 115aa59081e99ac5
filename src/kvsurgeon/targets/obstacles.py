"""What stands between a model and a target, as the target's data says it."""

from __future__ import annotations

from collections.abc import Iterator

from kvsurgeon.targets.facts import CacheEntry, Facts
from kvsurgeon.targets.target import Obstacle, Target

_SPELLED = ("batch", "kv_heads", "sequence", "head_dim")


def obstacles(target: Target, facts: Facts) -> tuple[Obstacle, ...]:
    """Return what stands in the way of `target`, what stops it first."""
    found = [
        *_interface(target, facts),
        *_types(target, facts),
        *_sizes(target, facts),
        *_operators(target, facts),
        *(one for rule in target.rules for one in rule(facts)),
    ]
    return tuple(sorted(found, key=lambda obstacle: not obstacle.stops))


def _interface(target: Target, facts: Facts) -> Iterator[Obstacle]:
    if not facts.cache:
        yield Obstacle(what=f"expected caches named {target.cache.past}, found none")
    there = {tensor.name for tensor in (*facts.inputs, *facts.outputs)}
    for name in target.needs:
        if name not in there:
            found = ", ".join(f"`{tensor.name}`" for tensor in (*facts.inputs, *facts.outputs))
            yield Obstacle(what=f"expected an input or output `{name}`, found {found}")
    for tensor in facts.inputs if target.feeds is not None else ():
        if tensor.name not in (target.feeds or ()):
            known = ", ".join(f"`{name}`" for name in sorted(target.feeds or ()))
            yield Obstacle(what=f"expected no inputs but {known} and the cache, found another", at=tensor.name)


def _types(target: Target, facts: Facts) -> Iterator[Obstacle]:
    for tensor in (*facts.inputs, *facts.outputs):
        wanted = (target.dtypes or {}).get(tensor.name)
        if wanted is not None and tensor.dtype not in wanted:
            yield Obstacle(what=f"expected {_either(wanted)}, found {tensor.dtype}", at=tensor.name)
    for entry in facts.cache:
        if target.cache_dtypes and entry.past.dtype not in target.cache_dtypes:
            yield Obstacle(
                what=f"expected a cache of {_either(target.cache_dtypes)}, found {entry.past.dtype}", at=entry.past.name
            )
            return  # one such message says it for all layers


def _sizes(target: Target, facts: Facts) -> Iterator[Obstacle]:
    for entry in facts.cache:
        for axis in target.fixed_axes:
            if not isinstance(entry.past.dims[axis], int):
                yield Obstacle(
                    what=f"expected a number for {_SPELLED[axis]}, found {entry.past.dims[axis]}", at=entry.past.name
                )
    if target.uniform:
        yield from _odd_one(facts)


def _odd_one(facts: Facts) -> Iterator[Obstacle]:
    """Yield the first layer whose key or value has another shape than that of the first layer."""
    first: dict[str, CacheEntry] = {}
    for entry in facts.cache:
        usual = first.setdefault(entry.kind, entry)
        if usual.past.dims != entry.past.dims:
            yield Obstacle(
                what=f"expected caches of one shape in all layers, {list(usual.past.dims)} as in layer {usual.layer}, "
                f"found {list(entry.past.dims)} in layer {entry.layer}",
                at=entry.past.name,
            )
            return


def _operators(target: Target, facts: Facts) -> Iterator[Obstacle]:
    if target.opset is not None and facts.opset > target.opset:
        yield Obstacle(
            what=f"expected operators of opset {target.opset} or older, found opset {facts.opset}",
            hint=f"export with opset {target.opset}",
        )
    for (domain, operator), at in facts.operators.items():
        known = target.operators is None or (domain, operator) in target.operators
        if not known or (domain, operator) in target.banned:
            dim_names = f"{domain}.{operator}" if domain else operator
            yield Obstacle(what=f"the operator {dim_names} is none that {target.name} has", at=at)


def _either(names: frozenset[str]) -> str:
    return " or ".join(sorted(names))
