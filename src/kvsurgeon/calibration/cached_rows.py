"""The largest features of cached keys and values on a text, from which static scales follow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.calibration.activations import ROW, calibration_rows
from kvsurgeon.errors import UsageError
from kvsurgeon.parity.prediction import longest_text, open_decoder, predict
from kvsurgeon.runtime import Array, CachedDecoder
from kvsurgeon.runtime.text import load_tokenizer, side_folders


def largest_features(model: ir.Model, text: Path, folder: Path | None = None) -> Mapping[str, Array]:
    """Return the largest absolute value of each feature of each head on the first half of a text.

    Args:
        model: A model with a cache of `[batch, kv_heads, sequence, head_dim]`.
        text: The text; see `calibration_rows`.
        folder: Folder of its external weights, and of its tokenizer.

    Returns:
        Arrays `[kv_heads, head_dim]` by the name of the cache input.

    Raises:
        InputError: The text cannot be read.
        UsageError: The text is too short, or the model takes no token IDs.
        RunError: onnxruntime cannot run the model.
    """
    largest: dict[str, Array] = {}
    with io.staged(model, None, folder) as proto:
        decoder = open_decoder(proto, "the model to calibrate", (), folder, None)
        assert isinstance(decoder, CachedDecoder)
        if decoder.inputs.tokens.kind != "tokens":
            raise UsageError(f"expected an input of token ids to calibrate on, found `{decoder.inputs.tokens.name}`")
        tokenizer = load_tokenizer(side_folders(proto, folder))
        for row in calibration_rows(text, tokenizer, longest_text(decoder, ROW)):
            predict(decoder, row)
            for entry in (one for one in decoder.cache if not one.is_fixed):
                found = np.abs(decoder.cached_rows(entry).astype(np.float32)).max(axis=(0, 2))
                largest[entry.past.name] = np.maximum(largest.get(entry.past.name, found), found)
    return largest
