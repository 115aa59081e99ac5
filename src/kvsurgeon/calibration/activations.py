"""Inner values of a model on a text, a row of the text at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from kvsurgeon import io
from kvsurgeon.errors import UsageError
from kvsurgeon.parity.prediction import longest_text, open_decoder, predict
from kvsurgeon.runtime import Array, Tokens
from kvsurgeon.runtime.text import halves, load_tokenizer, read_text, side_folders

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROW = 512  # tokens of a call
ROWS = 16  # calls


def activations(
    model: ir.Model, values: Sequence[str], text: Path, *, folder: Path | None = None
) -> Iterator[dict[str, Array]]:
    """Yield values of a model for each row of the first half of a text.

    Only one row is in memory at a time: accumulate, and keep no row. A model with a cache starts each row with an empty
    one, and computes the row in one call.

    Args:
        model: The model, whose weights may be computed ones.
        values: Names of values of its graph.
        text: The text; see `calibration_rows`.
        folder: Folder of its external weights, and of its tokenizer.

    Raises:
        InputError: The text cannot be read.
        UsageError: The text is too short, or the model takes no token IDs.
        RunError: onnxruntime cannot run the model.
    """
    with io.staged(model, None, folder) as proto:
        decoder = open_decoder(proto, "the model to calibrate", values, folder, None)
        if decoder.inputs.tokens.kind != "tokens":
            raise UsageError(f"expected an input of token ids to calibrate on, found `{decoder.inputs.tokens.name}`")
        tokenizer = load_tokenizer(side_folders(proto, folder))
        (first, *_) = calibration_rows(text, tokenizer, ROW)
        length = decoder.length or longest_text(decoder, ROW, first[0].tolist())
        for row in calibration_rows(text, tokenizer, length, whole=decoder.length is not None):
            found = predict(decoder, row, values)
            yield {name: found[name] for name in values}


def calibration_rows(
    text: Path, tokenizer: Tokenizer | None, row: int, *, whole: bool = False, most: int | None = ROWS
) -> list[Tokens]:
    """Return the first half of a text as rows of token IDs, `[1, row]` each; the last one may be shorter.

    The second half is left for measuring the loss.

    Args:
        text: A text file; without a tokenizer, a file of token IDs.
        tokenizer: The tokenizer of the model.
        row: Tokens of a row.
        whole: Whether to leave out a shorter row.
        most: Number of rows, at most; None for all.

    Raises:
        InputError: The text cannot be read.
        UsageError: The text has too few tokens.
    """
    tokens, _ = halves(read_text(text, tokenizer))
    fewest = row if whole else 2
    if len(tokens) < fewest:
        raise UsageError(f"expected a text of at least {2 * fewest} tokens to calibrate on, found fewer in `{text}`")
    starts = range(0, len(tokens) - fewest + 1, row)[:most]
    return [np.array([tokens[start : start + row]], np.int64) for start in starts]
