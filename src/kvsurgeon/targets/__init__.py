"""Targets: the form of a cached model that a runtime or compiler expects, as data; one target, one file."""

from kvsurgeon.targets.catalogue import TARGETS
from kvsurgeon.targets.compatibility import find_incompatibilities
from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target

__all__ = ["TARGETS", "Incompatibility", "ModelInfo", "Target", "find_incompatibilities"]
