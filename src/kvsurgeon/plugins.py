"""Things that are had by name: the built-in ones, and those that installed packages bring by an entry point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from kvsurgeon.errors import PluginError, UsageError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that can be had by name; nothing is imported until it is loaded."""

    kind: str  # "pass", "target"
    name: str
    place: str  # "package.module:NAME"
    package: str  # "kvsurgeon", or the name and version of the package that brings it

    @property
    def built_in(self) -> bool:
        """Whether kvsurgeon itself brings it."""
        return self.package == "kvsurgeon"

    @property
    def spoken(self) -> str:
        """What a message calls it."""
        return f"{self.kind} {self.name} of {self.package} ({self.place})"

    def imported(self) -> Any:
        """Return what stands at its place, whatever that is.

        Raises:
            PluginError: It cannot be imported.
        """
        try:
            return _at(self.place)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise PluginError(f"{self.spoken}: cannot be imported: {reason}") from error


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, kw_only=True)
class Clash:
    """One name that two things of a kind want."""

    kinds: str
    name: str
    first: Entry
    second: Entry

    def __str__(self) -> str:
        sides = " and ".join(f"{one.package} ({one.place})" for one in (self.first, self.second))
        return f"two {self.kinds} are called {self.name}: of {sides}; uninstall one of them, or rename its entry point"


@dataclass(frozen=True, kw_only=True)
class Catalogue(Generic[E]):
    """All things of a kind, by name."""

    kind: str  # "pass"
    kinds: str  # "passes"; installed packages bring theirs by the entry points `kvsurgeon.passes`
    entry: type[E]
    built_in: Mapping[str, str]  # places by name
    reserved: tuple[str, ...] = ()  # names that none may take

    def entries(self) -> tuple[E, ...]:
        """Return every one that can be had, built-in ones first; where names clash, none of that name."""
        clashing = {clash.name for clash in self.clashes()}
        return tuple(entry for entry in self._all() if entry.name not in clashing)

    def clashes(self) -> tuple[Clash, ...]:
        """Return the names that more than one want, or that one wants although it is reserved."""
        first = {name: self._entry(name, "the command", "kvsurgeon") for name in self.reserved}
        found = {}
        for entry in self._all():
            known = first.setdefault(entry.name, entry)
            if known is not entry:
                found[entry.name] = Clash(kinds=self.kinds, name=entry.name, first=known, second=entry)
        return tuple(found.values())

    def find(self, name: str) -> E:
        """Return the one of that name.

        Raises:
            PluginError: Two have that name.
            UsageError: None has.
        """
        for clash in self.clashes():
            if clash.name == name:
                raise PluginError(str(clash))
        known = {entry.name: entry for entry in self.entries()}
        if name not in known:
            raise UsageError(f"there is no {self.kind} called {name}; there are: {', '.join(known)}")
        return known[name]

    def _all(self) -> Iterator[E]:
        for name, place in self.built_in.items():
            yield self._entry(name, place, "kvsurgeon")
        for name, place, package in _installed(f"kvsurgeon.{self.kinds}"):
            yield self._entry(name, place, package)

    def _entry(self, name: str, place: str, package: str) -> E:
        return self.entry(kind=self.kind, name=name, place=place, package=package)


def _installed(group: str) -> list[tuple[str, str, str]]:
    """Return name, place and package of what installed packages bring under an entry point, each once, in order."""
    return sorted({(point.name, point.value, _package(point)) for point in entry_points(group=group)})


def _package(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _at(place: str) -> Any:
    module, _, attributes = place.partition(":")
    found: Any = import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found
