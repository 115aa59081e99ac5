"""The operator table: entries by domain, name and version, those of installed packages included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import entry_points

import onnx_ir as ir

from kvsurgeon.errors import PluginError, describe_exception
from kvsurgeon.ops import attention, contraction, elementwise, gather, generation, layout, recurrence, reduction
from kvsurgeon.ops.contraction import Contraction
from kvsurgeon.ops.operator import AxisLinks, Operator, Trait, UntraceableAxesError
from kvsurgeon.symbolic.fact import OperatorCall

ENTRY_POINT = "kvsurgeon.operators"  # group of functions that return entries

BUILT_IN: tuple[Operator, ...] = tuple(
    operator
    for kind in (elementwise, layout, gather, generation, contraction, reduction, attention, recurrence)
    for operator in kind.OPERATORS
)

KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft")
_STANDARD = {"ai.onnx": ""}
_OTHER_DOMAIN = {"": "com.microsoft", "ai.onnx": "com.microsoft", "com.microsoft": ""}  # onnxruntime: several in both
_Table = dict[tuple[str, str], list[Operator]]


def _table(operators: Iterable[Operator]) -> _Table:
    found: _Table = {}
    for operator in operators:
        found.setdefault((operator.domain, operator.op_type), []).append(operator)
    for versions in found.values():
        versions.sort(key=lambda operator: -operator.since_version)
    return found


_BUILT_IN = _table(BUILT_IN)
_registered: ContextVar[tuple[Operator, ...]] = ContextVar("registered", default=())


@contextmanager
def registered(*operators: Operator) -> Iterator[None]:
    """Know these operators inside the block, before those of installed packages and built-in ones."""
    token = _registered.set((*operators, *_registered.get()))
    try:
        yield
    finally:
        _registered.reset(token)


def find(domain: str, op_type: str, version: int | None = None) -> Operator | None:
    """Return the entry of an operator, at a version of its domain or the newest; None if there is none."""
    if extra := _registered.get():
        found = _newest(_table(extra), domain, op_type, version)
        if found is not None:
            return found
    return _built_in(domain, op_type, version) or _newest(installed_operators(), domain, op_type, version)


@cache
def _built_in(domain: str, op_type: str, version: int | None) -> Operator | None:
    found = _newest(_BUILT_IN, domain, op_type, version)
    if found is None and domain in _OTHER_DOMAIN:
        found = _newest(_BUILT_IN, _OTHER_DOMAIN[domain], op_type, None)
    return found


def _newest(table: _Table, domain: str, op_type: str, version: int | None) -> Operator | None:
    versions = table.get((_STANDARD.get(domain, domain), op_type), ())
    return next((one for one in versions if version is None or one.since_version <= version), None)


@cache
def installed_operators() -> _Table:
    """Return the entries of installed packages.

    Raises:
        PluginError: A package's entries cannot be loaded.
    """
    found: list[Operator] = []
    for point in entry_points(group=ENTRY_POINT):
        package = point.dist.name if point.dist is not None else point.value
        try:
            entries = list(point.load()())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # such as SystemExit
            raise PluginError(f"operators of {package}: {describe_exception(error)}") from error
        wrong = next((one for one in entries if not isinstance(one, Operator)), None)
        if wrong is not None:
            raise PluginError(f"operators of {package}: expected entries of type Operator, found {wrong!r}")
        found += entries
    return _table(found)


def operator_of(node: ir.Node) -> Operator | None:
    """Return the entry of a node's operator; None if there is none."""
    return find(node.domain, node.op_type)


def has_trait(node: ir.Node | None, *traits: Trait) -> bool:
    """Whether a node's operator has one of these traits."""
    operator = None if node is None else operator_of(node)
    return operator is not None and not operator.traits.isdisjoint(traits)


def axis_links(call: OperatorCall) -> AxisLinks | None:
    """Return how the axes of a node correspond; None if its operator has no links.

    Raises:
        UntraceableAxesError: The axes of this node cannot be linked.
    """
    operator = find(call.node.domain, call.node.op_type, call.opset if call.node.domain in ("", "ai.onnx") else None)
    try:
        return None if operator is None or operator.axes is None else operator.axes(call)
    except ValueError as error:  # an axis that the tensor does not have
        raise UntraceableAxesError(str(error)) from error


def find_links(call: OperatorCall) -> AxisLinks | None:
    """Return how the axes of a node correspond; None if that is not known."""
    try:
        return axis_links(call)
    except UntraceableAxesError:
        return None


def contraction_of(call: OperatorCall) -> Contraction | None:
    """Return the sum that a product computes; None if a rank is unknown or the node is no product of two tensors."""
    operator = operator_of(call.node)
    found: Contraction | None = None if operator is None or operator.notation is None else operator.notation(call)
    return found


def names_with(*traits: Trait) -> frozenset[str]:
    """Return the names of the built-in operators that have one of these traits."""
    return frozenset(one.op_type for one in BUILT_IN if not one.traits.isdisjoint(traits))
