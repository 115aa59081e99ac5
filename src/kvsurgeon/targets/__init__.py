"""How runtimes and compilers want a model with a cache, as data: one target, one file."""

from kvsurgeon.targets.catalogue import entries, find
from kvsurgeon.targets.facts import Facts, facts_of
from kvsurgeon.targets.obstacles import obstacles
from kvsurgeon.targets.target import Obstacle, SideFile, Target

__all__ = ["Facts", "Obstacle", "SideFile", "Target", "entries", "facts_of", "find", "obstacles"]
