"""Models laid out as the benchmarks read them: `<group>/<name>/model.onnx, meta.json, io.npz`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from laws import in_onnxruntime, texts
from verification.corpus import Entry, find_entries


def lay_out(folder: Path, model: onnx.ModelProto, *calls: dict[str, np.ndarray], **meta: str) -> Entry:
    """Write a model and stored calls of it, as a corpus holds them."""
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    (folder / "meta.json").write_text(json.dumps({"expected": "inject", **meta}), "utf-8")
    arrays = {f"{name}_{number}": array for number, call in enumerate(calls) for name, array in call.items()}
    np.savez(folder / "io.npz", **arrays)
    (entry,) = find_entries([folder], groups=[], names=[])
    return entry


def stored(model: onnx.ModelProto, **options: Any) -> dict[str, np.ndarray]:
    """A call of a model, and what it gives."""
    feeds = texts(model, **options)
    return {**feeds, "logits": in_onnxruntime(model)(feeds)["logits"]}
