"""Which passes there are: the built-in ones, and those that installed packages bring."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from kvsurgeon.errors import PluginError, UsageError

GROUP = "kvsurgeon.passes"

BUILT_IN = {
    "inject": "kvsurgeon.passes.inject:Inject",
    "eject": "kvsurgeon.passes.eject:Eject",
    "retarget": "kvsurgeon.passes.retarget:Retarget",
    "without-mask": "kvsurgeon.passes.without_mask:WithoutMask",
    "count-positions": "kvsurgeon.passes.count_positions:CountPositions",
    "last-logits": "kvsurgeon.passes.last_logits:LastLogits",
    "name-dims": "kvsurgeon.passes.name_dims:NameDims",
    "give-context": "kvsurgeon.passes.give_context:GiveContext",
    "narrow-ids": "kvsurgeon.passes.narrow_ids:NarrowIds",
    "without-nan-guards": "kvsurgeon.passes.nan_guards:WithoutNanGuards",
    "raise-opset": "kvsurgeon.passes.raise_opset:RaiseOpset",
    "half-range-masks": "kvsurgeon.passes.half_range:half_range_masks",
    "fix-shapes": "kvsurgeon.passes.fix_shapes:FixShapes",
    "replicate-kv-heads": "kvsurgeon.passes.replicate_kv_heads:ReplicateKvHeads",
    "expand-gqa": "kvsurgeon.passes.expand_gqa:ExpandGqa",
    "merge-kv-heads": "kvsurgeon.passes.merge_kv_heads:MergeKvHeads",
    "share-kv-layers": "kvsurgeon.passes.share_kv_layers:ShareKvLayers",
    "position-ids": "kvsurgeon.passes.position_ids:PositionIds",
    "rename": "kvsurgeon.passes.rename:Rename",
}

COMMANDS = (
    "inspect",
    "run",
    "passes",
    "targets",
    "verify",
    "plot",
    "generate",
    "demo",
)  # names that a pass may not take


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A pass that can be had by name; nothing is imported until it is loaded."""

    name: str
    target: str  # "package.module:Class"
    package: str  # "kvsurgeon", or the name and version of the package that brings it

    @property
    def built_in(self) -> bool:
        """Whether kvsurgeon itself brings it."""
        return self.package == "kvsurgeon"

    def load(self) -> type[Any]:
        """Return the pass class.

        Raises:
            PluginError: It cannot be imported, or is no pass; the message names the pass and its package.
        """
        try:
            found = named(self.target)
        except Exception as error:
            raise PluginError(f"{self._spoken}: cannot be imported: {_one_line(error)}") from error
        if inspect.isclass(found):
            return self._checked(found)
        if inspect.isfunction(found):
            from kvsurgeon.interop.functions import as_pass_class

            return as_pass_class(found, self.name)
        raise PluginError(f"{self._spoken}: expected a pass class or a function, found {type(found).__name__}")

    def summary(self) -> str:
        """Return what is true after it, in a line, without importing it."""
        if not self.built_in:
            return f"From {self.package}."
        module, _, name = self.target.partition(":")
        path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        body = ast.parse(path.read_text("utf-8")).body
        defined = (node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef))
        docstrings = (ast.get_docstring(node) for node in defined if node.name == name)
        return (next(docstrings, None) or "").partition("\n")[0]

    @property
    def _spoken(self) -> str:
        return f"pass {self.name} of {self.package} ({self.target})"

    def _checked(self, found: type[Any]) -> type[Any]:
        if not callable(getattr(found, "apply", None)):
            raise PluginError(f"{self._spoken}: expected a class with a method `apply`, found none")
        called = getattr(found, "name", self.name)
        if called != self.name:
            raise PluginError(f"{self._spoken}: the class says that it is called {called}; make the two names one")
        return found


@dataclass(frozen=True, kw_only=True)
class Clash:
    """One name that two passes want."""

    name: str
    first: Entry
    second: Entry

    def __str__(self) -> str:
        sides = " and ".join(f"{one.package} ({one.target})" for one in (self.first, self.second))
        return f"two passes are called {self.name}: of {sides}; uninstall one of them, or rename its entry point"


def entries() -> tuple[Entry, ...]:
    """Return every pass that can be had, built-in ones first; where names clash, none of that name."""
    clashing = {clash.name for clash in clashes()}
    return tuple(entry for entry in _all_entries() if entry.name not in clashing)


def clashes() -> tuple[Clash, ...]:
    """Return the names that more than one pass, or a pass and a command, want."""
    first: dict[str, Entry] = {name: Entry(name=name, target="the command", package="kvsurgeon") for name in COMMANDS}
    found = {}
    for entry in _all_entries():
        known = first.setdefault(entry.name, entry)
        if known is not entry:
            found[entry.name] = Clash(name=entry.name, first=known, second=entry)
    return tuple(found.values())


def find(name: str) -> Entry:
    """Return the pass of that name.

    Raises:
        PluginError: Two passes have that name.
        UsageError: None has.
    """
    for clash in clashes():
        if clash.name == name:
            raise PluginError(str(clash))
    for entry in entries():
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in entries())
    raise UsageError(f"there is no pass called {name}; there are: {known}")


def _all_entries() -> Iterator[Entry]:
    for name, target in BUILT_IN.items():
        yield Entry(name=name, target=target, package="kvsurgeon")
    for name, target, package in installed(GROUP):
        yield Entry(name=name, target=target, package=package)


def installed(group: str) -> list[tuple[str, str, str]]:
    """Return name, place and package of what installed packages bring under an entry point, each once, in order."""
    return sorted({(point.name, point.value, _package(point)) for point in entry_points(group=group)})


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def named(target: str) -> Any:
    """Return what `package.module:NAME` names; whatever its import raises is passed on."""
    module, _, attributes = target.partition(":")
    found: Any = import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
