"""Which targets there are: the built-in ones, and those that installed packages bring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvsurgeon.errors import PluginError, UsageError
from kvsurgeon.registry import installed, named
from kvsurgeon.targets.target import Target

GROUP = "kvsurgeon.targets"

BUILT_IN = {
    "optimum": "kvsurgeon.targets.optimum:OPTIMUM",
    "genai": "kvsurgeon.targets.genai:GENAI",
    "transformers-js": "kvsurgeon.targets.transformers_js:TRANSFORMERS_JS",
    "deepsparse": "kvsurgeon.targets.deepsparse:DEEPSPARSE",
    "openvino": "kvsurgeon.targets.openvino:OPENVINO",
    "tensorrt": "kvsurgeon.targets.tensorrt:TENSORRT",
    "qaic": "kvsurgeon.targets.qaic:QAIC",
    "qnn": "kvsurgeon.targets.qnn:QNN",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A target that can be had by name."""

    name: str
    place: str  # "package.module:CONSTANT"
    package: str  # "kvsurgeon", or the name and version of the package that brings it

    def load(self) -> Target:
        """Return the target.

        Raises:
            PluginError: It cannot be imported, is no target, or calls itself otherwise.
        """
        spoken = f"target {self.name} of {self.package} ({self.place})"
        try:
            found = named(self.place)
        except Exception as error:
            raise PluginError(f"{spoken}: cannot be imported: {type(error).__name__}: {error}") from error
        if not isinstance(found, Target):
            raise PluginError(f"{spoken}: expected a kvsurgeon.targets.Target, found {type(found).__name__}")
        if found.name != self.name:
            raise PluginError(f"{spoken}: the target says that it is called {found.name}; make the two names one")
        return found


def entries() -> tuple[Entry, ...]:
    """Return every target that can be had, built-in ones first; one that takes the name of another is left out."""
    first: dict[str, Entry] = {}
    for entry in _all_entries():
        first.setdefault(entry.name, entry)
    return tuple(first.values())


def find(name: str) -> Target:
    """Return the target of that name.

    Raises:
        PluginError: Two targets have that name, or it cannot be loaded.
        UsageError: None has.
    """
    found = [entry for entry in _all_entries() if entry.name == name]
    if len(found) > 1:
        sides = " and ".join(f"{entry.package} ({entry.place})" for entry in found)
        raise PluginError(f"two targets are called {name}: of {sides}; uninstall one, or rename its entry point")
    if found:
        return found[0].load()
    raise UsageError(f"there is no target called {name}; there are: {', '.join(entry.name for entry in entries())}")


def _all_entries() -> Iterator[Entry]:
    for name, place in BUILT_IN.items():
        yield Entry(name=name, place=place, package="kvsurgeon")
    for name, place, package in installed(GROUP):
        yield Entry(name=name, place=place, package=package)
