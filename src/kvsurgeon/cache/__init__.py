"""The cache that a graph already has: which inputs and outputs it is, and the graph without it."""

from kvsurgeon.cache.ejection import Ejection, eject
from kvsurgeon.cache.signature import CacheEntry, CacheSignature

__all__ = ["CacheEntry", "CacheSignature", "Ejection", "eject"]
