"""Load the graph of a model without its weights; save a model atomically, with its data and side files."""

from kvsurgeon.io.atomic_write import WrittenFile
from kvsurgeon.io.external_data import WeightFile, check_weights, weight_files
from kvsurgeon.io.loading import load, loaded_from
from kvsurgeon.io.locate import find_model
from kvsurgeon.io.roundtrip import to_proto
from kvsurgeon.io.saving import destination_of, save, save_variants
from kvsurgeon.io.staging import staged

__all__ = [
    "WeightFile",
    "WrittenFile",
    "check_weights",
    "destination_of",
    "find_model",
    "load",
    "loaded_from",
    "save",
    "save_variants",
    "staged",
    "to_proto",
    "weight_files",
]
