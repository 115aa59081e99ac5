"""How runtimes and compilers want a model with a cache, as data: one target, one file."""

from kvsurgeon.targets.catalogue import TARGETS
from kvsurgeon.targets.facts import Facts, facts_of
from kvsurgeon.targets.obstacles import obstacles
from kvsurgeon.targets.target import Obstacle, SideFile, Target, Variant

__all__ = ["TARGETS", "Facts", "Obstacle", "SideFile", "Target", "Variant", "facts_of", "obstacles"]
