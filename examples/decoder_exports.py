"""Export a decoder by both exporters of PyTorch, without a cache, with what a verifier needs.

`causal_types.py`, `other_packages.py` and `fixed_length.py` say which decoders. A folder holds `model.onnx`,
`meta.json` (how far the export came), and `io.npz`: calls and the logits of torch.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

EXPORTERS = ("dynamo", "torchscript")
LENGTH, BATCH = 11, 2  # of the text that is traced
VOCABULARY, LAYERS = 160, 2
LEAST, MOST = 4, 140  # ids of texts
SPREAD = 0.25  # standard deviation of weight matrices, so that tokens attend to few others
EQUAL = 1e-3  # error below which an export computes what torch does
LONGEST = 40
TEXTS = ((2, 13, 0), (2, 12, 4), (1, LONGEST, 0))  # batch, length, and padding at the left of the first


def write(
    build: Callable[[], torch.nn.Module], folder: Path, exporter: str, *,
    export: Callable[[Logits, Path, str], None] | None = None,
    sizes: Sequence[tuple[int, int, int]] = TEXTS, **facts: str,
) -> None:  # fmt: skip
    """Export a decoder with what a verifier needs, and say in `meta.json` how far it came."""
    folder.mkdir(parents=True, exist_ok=True)
    meta: dict[str, Any] = {"exporter": exporter, **facts}
    began = time.perf_counter()
    try:
        meta["stage"] = "build"
        core = build()
        meta["stage"] = "run"
        model, meta["leak"] = _runnable(core, sizes)
        meta["masked"] = model.masked
        calls = _calls(model, sizes)  # before the export, so that tables made in a call suffice for the longest text
        np.savez(folder / "io.npz", **calls)
        meta["stage"] = "export"
        (export or export_by_torch)(model, folder / "model.onnx", exporter)
        meta["stage"] = "compare"
        meta["export_error"] = _export_error(folder / "model.onnx", calls)
        meta["stage"] = "exported" if meta["export_error"] < EQUAL else "wrong export"
    except Exception as error:
        cause = _cause(error)
        meta["error"] = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
    meta["expected"] = "inject" if meta.get("leak", 1.0) < EQUAL else "refuse"
    meta["seconds"] = round(time.perf_counter() - began, 1)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _cause(error: BaseException) -> BaseException:
    """Return the first of the errors that led to an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model random weights that make its logits depend on every token and its position."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and weight.is_floating_point():
            torch.nn.init.normal_(weight, std=SPREAD if "emb" not in name else 0.5)
    return model.eval()


class Logits(torch.nn.Module):
    """A model as a function of token ids and a mask."""

    def __init__(self, model: torch.nn.Module, *, masked: bool) -> None:
        super().__init__()
        self.model, self.masked = model, masked
        taken = inspect.signature(model.forward).parameters
        self.ids = "input_ids" if "input_ids" in taken else next(iter(taken))
        self.settings = {name: False for name in ("use_cache",) if name in taken}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits [batch, sequence, vocabulary]."""
        given = {"attention_mask": attention_mask} if self.masked else {}
        return logits_of(self.model(**{self.ids: input_ids}, **given, **self.settings))


def logits_of(result: Any) -> torch.Tensor:
    """Return the logits of what a model returns: a tensor, a tuple that begins with it, or an object that has it."""
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


def texts(sizes: Sequence[tuple[int, int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and masks of texts of given sizes."""
    draw = np.random.default_rng(7)
    for batch, length, padding in sizes:
        ids = draw.integers(LEAST, MOST, (batch, length))
        mask = np.ones_like(ids)
        mask[0, :padding] = 0
        yield ids, mask


def leak(model: Logits, sizes: Sequence[tuple[int, int, int]] = TEXTS) -> float:
    """Return how much logits change, compared with their spread, if a later token changes."""
    ids, mask = map(torch.from_numpy, next(texts(sizes)))
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 17) % MOST
    with torch.no_grad():
        before, after = model(ids, mask), model(other, mask)
    return float((before[:, :9] - after[:, :9]).abs().max() / before.std())


def export_by_torch(model: Logits, file: Path, exporter: str) -> None:
    """Write a model with a batch and a length that are symbols."""
    ids = torch.randint(LEAST, MOST, (BATCH, LENGTH))
    inputs = (ids, torch.ones_like(ids)) if model.masked else (ids,)
    names = ["input_ids", "attention_mask"][: len(inputs)]
    settings: dict[str, Any] = {"input_names": names, "output_names": ["logits"]}
    if exporter == "dynamo":
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", min=2, max=LONGEST)}
        settings |= {"dynamic_shapes": (axes,) * len(inputs), "external_data": False}
        torch.onnx.export(model, inputs, file, dynamo=True, opset_version=20, **settings)
    else:
        settings["dynamic_axes"] = {name: {0: "batch", 1: "sequence"} for name in (*names, "logits")}
        torch.onnx.export(model, inputs, str(file), dynamo=False, opset_version=17, **settings)


def _runnable(core: torch.nn.Module, sizes: Sequence[tuple[int, int, int]] = TEXTS) -> tuple[Logits, float]:
    """Return the model with a mask, or without one if it takes none, and its leak."""
    try:
        model = Logits(core, masked=True).eval()
        return model, leak(model, sizes)
    except Exception:
        model = Logits(core, masked=False).eval()
        return model, leak(model, sizes)


def _calls(model: Logits, sizes: Sequence[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    calls = {}
    for index, (ids, mask) in enumerate(texts(sizes)):
        if not model.masked and not mask.all():
            continue
        with torch.no_grad():
            calls[f"logits_{index}"] = model(torch.from_numpy(ids), torch.from_numpy(mask)).float().numpy()
        calls[f"input_ids_{index}"] = ids
        if model.masked:
            calls[f"attention_mask_{index}"] = mask
    return calls


def _export_error(file: Path, calls: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of an export from torch at tokens that count, compared with the spread."""
    session, worst = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]), 0.0
    for name, expected in calls.items():
        index = name.removeprefix("logits_")
        if index == name:
            continue
        (found,) = session.run(None, {given.name: calls[f"{given.name}_{index}"] for given in session.get_inputs()})
        counts = calls.get(f"attention_mask_{index}", calls[f"input_ids_{index}"] * 0 + 1) == 1
        worst = max(worst, float(np.abs(found - expected)[counts].max() / expected.std()))
    return worst
