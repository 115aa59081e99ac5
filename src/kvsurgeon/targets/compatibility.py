"""Check a model against the requirements of a target."""

from __future__ import annotations

from collections.abc import Iterator, Set

from kvsurgeon.cache.layout import DEFAULT_LAYOUT
from kvsurgeon.targets.model_info import CachePairInfo, ModelInfo, Operator
from kvsurgeon.targets.target import EMBEDDINGS, Incompatibility, Target, warning

_ONNX_DOMAINS = ("", "ai.onnx")


def find_incompatibilities(target: Target, model: ModelInfo) -> tuple[Incompatibility, ...]:
    """Return all incompatibilities of a model with `target`, blocking ones first."""
    found = [
        *_check_interface(target, model),
        *_check_dtypes(target, model),
        *_check_cache_shapes(target, model),
        *_check_operators(target, model),
        *(one for check in target.checks for one in check(model)),
    ]
    return tuple(sorted(found, key=lambda one: not one.blocking))


def check_custom_operators(model: ModelInfo) -> Iterator[Incompatibility]:
    """Warn of operators outside ONNX's own domain: compilers rarely document which of them they implement."""
    found = {operator_name(one): at for one, at in model.operators.items() if one[0] not in _ONNX_DOMAINS}
    if found:
        yield warning(
            f"{', '.join(sorted(found))}: not ONNX operators, so the compiler may not implement them",
            at=next(iter(found.values())),
        )


def operator_name(operator: Operator) -> str:
    """Return the name of an operator, with its domain unless it is ONNX's own."""
    domain, name = operator
    return f"{domain}.{name}" if domain else name


def _check_interface(target: Target, model: ModelInfo) -> Iterator[Incompatibility]:
    if not model.cache and not model.states:
        yield Incompatibility(f"expected a cache named {target.cache.of_decoder.past}, found none")
    names = [tensor.name for tensor in (*model.inputs, *model.outputs)]
    for name in target.required:
        if name not in names:
            found = ", ".join(f"`{name}`" for name in names)
            takes = name == "input_ids" and EMBEDDINGS in names
            hint = f"for a decoder of embeddings use a target that takes `{EMBEDDINGS}`: see `kvsurgeon targets`"
            yield Incompatibility(f"expected an input or output `{name}`, found {found}", hint=hint if takes else None)
    for state in model.states:
        if state.kind not in target.states:
            yield Incompatibility(f"expected no {state.kind}, which {target.name} does not keep", at=state.past.name)
    allowed = target.allowed_inputs
    for name in model.input_names:
        if allowed is not None and name not in allowed:
            known = ", ".join(f"`{name}`" for name in sorted(allowed))
            yield Incompatibility(f"expected no inputs but {known} and the cache, found another", at=name)


def _check_dtypes(target: Target, model: ModelInfo) -> Iterator[Incompatibility]:
    for tensor in (*model.inputs, *model.outputs):
        expected = target.dtypes.get(tensor.name)
        if expected is not None and tensor.dtype not in expected:
            yield Incompatibility(f"expected {_either(expected)}, found {tensor.dtype}", at=tensor.name)
    for past in (pair.past for pair in (*model.cache, *model.states)):
        if target.cache_dtypes and past.dtype not in target.cache_dtypes:
            yield Incompatibility(
                f"expected a cache of {_either(target.cache_dtypes)}, found {past.dtype}", at=past.name
            )
            return  # one message for all layers


def _check_cache_shapes(target: Target, model: ModelInfo) -> Iterator[Incompatibility]:
    for past in (pair.past for pair in model.cache):
        for axis in target.static_axes:
            if not isinstance(past.dims[axis], int):
                yield Incompatibility(
                    f"expected a fixed size for {DEFAULT_LAYOUT[axis]}, found {past.dims[axis]}", at=past.name
                )
    first: dict[str, CachePairInfo] = {}
    for pair in model.cache if target.uniform else ():
        usual = first.setdefault(pair.kind, pair)
        if usual.past.dims != pair.past.dims:
            yield Incompatibility(
                f"expected caches of one shape in all layers, {list(usual.past.dims)} as in layer "
                f"{usual.layer}, found {list(pair.past.dims)} in layer {pair.layer}",
                at=pair.past.name,
            )
            return


def _check_operators(target: Target, model: ModelInfo) -> Iterator[Incompatibility]:
    if target.max_opset is not None and model.opset > target.max_opset:
        yield Incompatibility(
            f"expected opset {target.max_opset} or older, found opset {model.opset}",
            hint=f"export with opset {target.max_opset}",
        )
    for operator, at in model.operators.items():
        implemented = target.operators is None or operator in target.operators
        if not implemented or operator in target.unsupported_operators:
            yield Incompatibility(f"{target.name} has no operator {operator_name(operator)}", at=at)


def _either(names: Set[str]) -> str:
    return " or ".join(sorted(names))
