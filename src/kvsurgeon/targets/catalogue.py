"""Which targets there are: the built-in ones, and those that installed packages bring."""

from __future__ import annotations

from dataclasses import dataclass

from kvsurgeon.errors import PluginError
from kvsurgeon.plugins import Catalogue, Entry
from kvsurgeon.targets.target import Target

BUILT_IN = {
    "optimum": "kvsurgeon.targets.optimum:OPTIMUM",
    "genai": "kvsurgeon.targets.genai:GENAI",
    "genai-shared-buffer": "kvsurgeon.targets.genai:GENAI_SHARED_BUFFER",
    "transformers-js": "kvsurgeon.targets.transformers_js:TRANSFORMERS_JS",
    "deepsparse": "kvsurgeon.targets.deepsparse:DEEPSPARSE",
    "openvino": "kvsurgeon.targets.openvino:OPENVINO",
    "tensorrt": "kvsurgeon.targets.tensorrt:TENSORRT",
    "qaic": "kvsurgeon.targets.qaic:QAIC",
    "qnn": "kvsurgeon.targets.qnn:QNN",
}


@dataclass(frozen=True, kw_only=True)
class TargetEntry(Entry):
    """A target that can be had by name."""

    def load(self) -> Target:
        """Return the target.

        Raises:
            PluginError: It cannot be imported, is no target, or calls itself otherwise.
        """
        found = self.imported()
        if not isinstance(found, Target):
            raise PluginError(f"{self.spoken}: expected a kvsurgeon.targets.Target, found {type(found).__name__}")
        if found.name != self.name:
            raise PluginError(f"{self.spoken}: the target says that it is called {found.name}; make the two names one")
        return found


TARGETS = Catalogue(kind="target", kinds="targets", entry=TargetEntry, built_in=BUILT_IN)
