"""Text and tokens: a model's tokenizer, and the tokens at which it stops."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kvsurgeon.errors import InputError, UsageError
from kvsurgeon.runtime.session import Source, folder_of

Prompt = str | Sequence[int]
_INCOMPLETE = "\ufffd"  # what a tokenizer gives for bytes that are not a whole character yet


def side_folders(source: Source, folder: str | Path | None = None) -> tuple[Path, ...]:
    """Return where the side files of a model may lie: with it, or one folder above (`onnx/model.onnx`)."""
    found = folder_of(source, folder)
    if found is None:
        return ()
    own = found.resolve()
    return (own, own.parent)


def load_tokenizer(folders: Iterable[Path]) -> Tokenizer | None:
    """Return the tokenizer in `tokenizer.json`, None where no folder has one.

    Raises:
        InputError: The file is there and is no tokenizer.
    """
    path = _first(folders, "tokenizer.json")
    if path is None:
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"expected a tokenizer, found something else ({error}) - at `{path}`") from error


def tokens_of(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Return the tokens of a prompt; where there is no tokenizer, a text such as `1, 2, 3` is token ids.

    Raises:
        UsageError: There is nothing to read the prompt with, or nothing in it.
    """
    if not isinstance(prompt, str):
        tokens = [int(token) for token in prompt]
    elif tokenizer is not None:
        tokens = list(tokenizer.encode(prompt).ids)
    elif re.fullmatch(r"\s*\d+([\s,]+\d+)*\s*", prompt):
        tokens = [int(token) for token in re.findall(r"\d+", prompt)]
    else:
        raise UsageError("expected tokenizer.json beside the model, found none (give the prompt as token ids: 1,2,3)")
    if not tokens:
        raise UsageError("expected a prompt of at least one token, found an empty one")
    return tokens


def stop_tokens(folders: Sequence[Path]) -> frozenset[int]:
    """Return the tokens that end a text, by `generation_config.json` or else `config.json`; none where neither says.

    Raises:
        InputError: A file is there and is not JSON.
    """
    for name in ("generation_config.json", "config.json"):
        path = _first(folders, name)
        found = None if path is None else _read(path).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


class Reader:
    """The text of one row as it grows, in pieces that are whole characters."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._said = 0
        self.text = ""

    def read(self, token: int) -> str:
        """Take one more token, and return what it adds to the text: empty within a character."""
        self._tokens.append(token)
        if self._tokenizer is None:
            return ""
        self.text = self._tokenizer.decode(self._tokens)
        if self.text.endswith(_INCOMPLETE):
            return ""
        piece, self._said = self.text[self._said :], len(self.text)
        return piece


def _first(folders: Iterable[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"expected JSON, found something else ({error}) - at `{path}`") from error
    return found if isinstance(found, dict) else {}
