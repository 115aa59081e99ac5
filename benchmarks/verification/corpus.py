"""Reads folders of models with stored reference logits: `<group>/<name>/model.onnx, meta.json, io.npz`."""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

EXPORTERS = (  # first word of `exporter` or `toolchain` that is found names the exporter
    ("negative-files", "damaged file"),
    ("hf_onnx", "dynamo"),
    ("dynamo=True", "dynamo"),
    ("(dynamo", "dynamo"),
    ("dynamo=False", "TorchScript"),
    ("(ts", "TorchScript"),
    ("dynamo", "dynamo"),
    ("torchscript", "TorchScript"),
    ("optimum", "optimum"),
    ("quant", "quantized"),
    ("onnxsim", "optimized"),
    ("onnxslim", "optimized"),
    ("onnxruntime", "optimized"),
    ("jax", "JAX"),
    ("tf2onnx", "TensorFlow"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One stored call of the original: what went in, and the logits that its source framework gave."""

    index: int
    inputs: dict[str, np.ndarray]  # by input name, each for all tokens
    reference: np.ndarray  # [batch, total, ...], or [batch, rows, ...] of the last tokens alone
    real: np.ndarray  # as the reference's first two axes, False at padding
    total: int  # tokens, padding included

    @property
    def batch(self) -> int:
        return int(self.reference.shape[0])

    @property
    def last_only(self) -> bool:
        """Whether the model answers for the last tokens alone."""
        return self.reference.shape[1] < self.total


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the corpus."""

    folder: Path
    meta: dict[str, Any] = field(repr=False)

    @property
    def path(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def group(self) -> str:
        return self.folder.parent.name

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        return f"{self.group}/{self.name}"

    @property
    def expected(self) -> str:
        return str(self.meta.get("expected", "inject"))

    @property
    def family(self) -> str:
        return str(self.meta.get("model_type") or self.meta.get("family") or self.name)

    @property
    def damaged(self) -> bool:
        return self.meta.get("kind") == "bad_file"

    @property
    def exporter(self) -> str:
        made_by = " ".join(str(self.meta.get(key, "")) for key in ("group", "exporter", "toolchain"))
        return next((label for word, label in EXPORTERS if word in made_by), "other")

    def cases(self, original: onnx.ModelProto) -> list[Case]:
        """Return the stored calls, in order; none where there is no `io.npz`."""
        if not (self.folder / "io.npz").exists():
            return []
        stored: dict[str, dict[str, np.ndarray]] = {}
        with np.load(self.folder / "io.npz") as arrays:
            for key in arrays.files:
                name, _, index = key.rpartition("_")
                stored.setdefault(index, {})[name] = arrays[key]
        outputs = {output.name: _token_axis(original, output) for output in original.graph.output}
        cases = [_case(int(index), arrays, outputs) for index, arrays in sorted(stored.items())]
        return [case for case in cases if case is not None]


def corpus_parser(description: str | None, *, sample: int | None = None) -> argparse.ArgumentParser:
    """Return a parser of the arguments of a program that runs over folders of models, of which others may be added.

    Args:
        description: The docstring of the program.
        sample: How many models are taken unless `--sample` says so; None for all.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--group", action="append", default=[], help="only this group; wildcards, repeatable")
    parser.add_argument("--only", action="append", default=[], help="only this name, or group/name; wildcards")
    parser.add_argument("--sample", type=int, default=sample, help="only so many models, evenly spaced; 0: all")
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser


def find_entries(folders: Sequence[Path], *, groups: Sequence[str], names: Sequence[str]) -> list[Entry]:
    """Return the models below `folders`, sorted, whose group and name match one of the wildcards given."""
    return [entry for folder in folders for entry in _below(folder) if _wanted(entry, groups, names)]


def spread_sample(entries: list[Entry], size: int | None) -> list[Entry]:
    """Return `size` of the entries, evenly spaced, the same ones each time."""
    if not size or size >= len(entries):
        return entries
    return [entries[index * len(entries) // size] for index in range(size)]


def _below(folder: Path) -> Iterator[Entry]:
    for meta in sorted(folder.rglob("meta.json")):
        yield Entry(folder=meta.parent.resolve(), meta=json.loads(meta.read_text(encoding="utf-8")))


def _wanted(entry: Entry, groups: Sequence[str], names: Sequence[str]) -> bool:
    in_group = not groups or any(fnmatch.fnmatch(entry.group, group) for group in groups)
    named = not names or any(fnmatch.fnmatch(text, name) for name in names for text in (entry.name, entry.label))
    return in_group and named


def _token_axis(model: onnx.ModelProto, output: onnx.ValueInfoProto) -> int:
    """Return the axis of an output that has the name of the last axis of ids or of a mask; 1 if none has."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    whole = [_dim_names(value) for value in model.graph.input if value.type.tensor_type.elem_type not in floats]
    names = {names[-1] for names in whole if len(names) > 1} - {""}
    found = [axis for axis, name in enumerate(_dim_names(output)) if name in names]
    return found[0] if len(found) == 1 else 1


def _dim_names(value: onnx.ValueInfoProto) -> list[str]:
    return [dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _case(index: int, arrays: dict[str, np.ndarray], outputs: dict[str, int]) -> Case | None:
    answer = next((name for name in (*outputs, "logits") if name in arrays), None)
    if answer is None or arrays[answer].ndim < 2:
        return None
    inputs = {name: array for name, array in arrays.items() if name != answer}
    reference = np.moveaxis(arrays[answer].astype(np.float32), outputs.get(answer, 1), 1)
    batch, rows = reference.shape[:2]
    is_asked_for = any(array.ndim == 0 and array.dtype.kind == "i" and array == rows for array in inputs.values())
    total = _tokens(inputs) if rows == 1 or is_asked_for else rows  # of the last tokens
    mask = _padding_mask(inputs, (batch, total))
    real = np.ones((batch, total), dtype=bool) if mask is None else mask.astype(bool)
    if mask is not None:
        inputs.setdefault("attention_mask_4d", _additive_mask(real))
    return Case(index=index, inputs=inputs, reference=reference, real=real[:, -rows:], total=total)


def _tokens(inputs: dict[str, np.ndarray]) -> int:
    """Return how many tokens a call is given: the length of its ids, or of their embeddings."""
    return max((array.shape[1] for array in inputs.values() if array.ndim in (2, 3)), default=1)


def _padding_mask(inputs: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray | None:
    """Return the input that says which tokens count: the one called a mask, else one that is 0s and then 1s.

    Types of tokens are 0 and 1 too.
    """
    able = {name: array for name, array in inputs.items() if array.shape == shape and set(np.unique(array)) <= {0, 1}}
    named = [array for name, array in able.items() if "mask" in name]
    unnamed = [array for name, array in able.items() if "type" not in name and _is_left_padded(array)]
    return next(iter(named + unnamed), None)


def _is_left_padded(array: np.ndarray) -> bool:
    numbers = array.astype(np.int64)
    return bool((np.diff(numbers, axis=1) >= 0).all() and (numbers[:, -1] == 1).all())


def _additive_mask(real: np.ndarray) -> np.ndarray:
    """Return the mask `[batch, 1, total, total]` that a caller of a model with such an input makes."""
    length = real.shape[1]
    visible = np.tril(np.ones((length, length), dtype=bool)) & real[:, None, None, :]
    return np.where(visible, 0.0, np.finfo(np.float32).min).astype(np.float32)
