"""Text and token IDs: the tokenizer of a model, and the tokens that end a text."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsurgeon.errors import InputError, UsageError
from kvsurgeon.io.json_files import read_json
from kvsurgeon.runtime.session import Source, folder_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Prompt = str | Sequence[int]
_SHOWN = 40  # characters of a prompt in a message


def side_folders(source: Source, folder: str | Path | None = None) -> tuple[Path, ...]:
    """Return the folders of a model's side files: its folder, and the one above (`onnx/model.onnx`)."""
    found = folder_of(source, folder)
    return () if found is None else (found.resolve(), found.resolve().parent)


def load_tokenizer(folders: Iterable[Path]) -> Tokenizer | None:
    """Return the tokenizer of the first `tokenizer.json`; None if no folder has one.

    Raises:
        InputError: The file is not a tokenizer.
    """
    path = find_file(folders, "tokenizer.json")
    if path is None:
        return None
    from tokenizers import Tokenizer  # verification needs none

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"expected a tokenizer, found something else ({error}) - at `{path}`") from error


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Return the token IDs of a prompt; without a tokenizer, a text such as `1, 2, 3` gives the IDs.

    Raises:
        UsageError: The prompt is text and there is no tokenizer, is not text, or is empty.
    """
    if not isinstance(prompt, str):
        tokens = [int(token) for token in prompt]
    elif prompt.encode("utf-8", "ignore").decode() != prompt:  # bytes of a command line that are no text
        raise UsageError(f"expected a text in {sys.getfilesystemencoding()}, found other bytes: {prompt[:_SHOWN]!r}")
    elif tokenizer is not None:
        tokens = list(tokenizer.encode(prompt).ids)
    elif re.fullmatch(r"\s*\d+([\s,]+\d+)*\s*", prompt):
        tokens = [int(token) for token in re.findall(r"\d+", prompt)]
    else:
        raise UsageError(
            f"expected token IDs such as 1,2,3, or a text and tokenizer.json next to the model, "
            f"found {prompt[:_SHOWN]!r}"
        )
    if not tokens:
        raise UsageError("expected a prompt of at least one token, found an empty one")
    return tokens


def read_text(path: Path, tokenizer: Tokenizer | None) -> list[int]:
    """Return the token IDs of a text file; without a tokenizer, a file such as `1, 2, 3` gives the IDs.

    Raises:
        InputError: The file cannot be read as UTF-8.
        UsageError: It is empty, or needs a tokenizer.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read the text `{path}`: {reason}") from error
    if not text.strip():
        raise UsageError(f"expected a text of more than 2 tokens, found an empty one in `{path}`")
    return encode_prompt(text, tokenizer)


def halves(tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Return the half of a text that passes are calibrated on, and the half that their loss is measured on."""
    middle = len(tokens) // 2
    return tokens[:middle], tokens[middle:]


def text_decoder(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """Return a function that takes generated tokens in order, and returns the text that each adds.

    The text is empty within a character, and without a tokenizer.
    """
    if tokenizer is None:
        return lambda token: ""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    return lambda token: stream.step(tokenizer, token) or ""


def stop_tokens(folders: Sequence[Path]) -> frozenset[int]:
    """Return the tokens that end a text, from `generation_config.json`, else `config.json`.

    Raises:
        InputError: A file is not JSON.
    """
    for name in ("generation_config.json", "config.json"):
        path = find_file(folders, name)
        found = None if path is None else read_object(path).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def find_file(folders: Iterable[Path], name: str) -> Path | None:
    """Return the first file of a name; None if no folder has one."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one for other JSON.

    Raises:
        InputError: The file is not JSON.
    """
    try:
        found = read_json(path)
    except ValueError as error:
        raise InputError(f"expected JSON, found something else ({error}) - at `{path}`") from error
    return found if isinstance(found, dict) else {}
