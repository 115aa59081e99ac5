"""Catalogues of objects by name: built-in ones, and those that installed packages register by entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from kvsurgeon.errors import PluginError, UsageError, describe_exception, did_you_mean

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Plugin(Generic[T]):
    """An object that can be loaded by name; nothing is imported before `load`.

    Attributes:
        kind: What it is, such as "pass" or "target".
        name: Its name on the command line.
        reference: Where it is defined, as "package.module:NAME".
        package: "kvsurgeon", or name and version of the package that registers it.
        check: Returns the object if it is one of this kind, else raises PluginError.
    """

    kind: str
    name: str
    reference: str
    package: str
    check: Callable[[Plugin[T], Any], T] = field(repr=False, compare=False)

    @property
    def built_in(self) -> bool:
        """Whether it is part of kvsurgeon."""
        return self.package == "kvsurgeon"

    def __str__(self) -> str:
        return f"{self.kind} {self.name} of {self.package} ({self.reference})"

    def load(self) -> T:
        """Import and return the object.

        Raises:
            PluginError: It cannot be imported, or is not of this kind.
        """
        module, _, attributes = self.reference.partition(":")
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results
                found: Any = import_module(module)
                for attribute in attributes.split("."):
                    found = getattr(found, attribute)
                return self.check(self, found)
        except (KeyboardInterrupt, PluginError):
            raise
        except BaseException as error:  # such as SystemExit
            raise PluginError(f"{self}: cannot be imported: {describe_exception(error)}") from error


@dataclass(frozen=True, kw_only=True)
class Catalogue(Generic[T]):
    """All objects of a kind, by name.

    Attributes:
        kind: What they are, in the singular, such as "pass".
        plural: The same in the plural; packages register theirs by the entry point `kvsurgeon.<plural>`.
        built_in: References of the built-in ones, by name.
        check: See `Plugin`.
        reserved: Names that no object may have.
        further: Name, reference and origin of objects that are neither built in nor of an installed package.
    """

    kind: str
    plural: str
    built_in: Mapping[str, str]
    check: Callable[[Plugin[T], Any], T]
    reserved: tuple[str, ...] = ()
    further: tuple[tuple[str, str, str], ...] = ()

    def plugins(self) -> tuple[Plugin[T], ...]:
        """Return all that can be loaded, built-in ones first; of a name with a conflict, none."""
        conflicts = {plugin.name for plugin, _ in self.conflicts()}
        return tuple(plugin for plugin in self._all() if plugin.name not in conflicts)

    def conflicts(self) -> tuple[tuple[Plugin[T], str], ...]:
        """Return each plugin whose name is taken or reserved, with the error message."""
        first = {name: self._plugin(name, "the command", "kvsurgeon") for name in self.reserved}
        found = {}
        for plugin in self._all():
            known = first.setdefault(plugin.name, plugin)
            if known is not plugin:
                sides = " and ".join(f"{one.package} ({one.reference})" for one in (known, plugin))
                message = (
                    f"two {self.plural} are called {plugin.name}: of {sides}; "
                    "uninstall one of them, or rename its entry point"
                )
                found[plugin.name] = (plugin, message)
        return tuple(found.values())

    def find(self, name: str) -> Plugin[T]:
        """Return the plugin of that name.

        Raises:
            PluginError: Two plugins have the name.
            UsageError: No plugin has the name.
        """
        for plugin, message in self.conflicts():
            if plugin.name == name:
                raise PluginError(message)
        known = {plugin.name: plugin for plugin in self.plugins()}
        if name not in known:
            raise UsageError(f"unknown {self.kind} {name!r}; {did_you_mean(name, known)}")
        return known[name]

    def _all(self) -> Iterator[Plugin[T]]:
        for name, reference in self.built_in.items():
            yield self._plugin(name, reference, "kvsurgeon")
        points = entry_points(group=f"kvsurgeon.{self.plural}")
        installed = sorted({(point.name, point.value, _package(point)) for point in points})
        for name, reference, package in (*installed, *self.further):
            yield self._plugin(name, reference, package)

    def _plugin(self, name: str, reference: str, package: str) -> Plugin[T]:
        return Plugin(kind=self.kind, name=name, reference=reference, package=package, check=self.check)


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
