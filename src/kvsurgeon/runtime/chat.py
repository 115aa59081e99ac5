"""The chat template of a model, as transformers renders it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvsurgeon.errors import UsageError, describe_exception
from kvsurgeon.runtime.text import find_file, read_object


def chat_prompt(message: str, folders: Iterable[Path]) -> str:
    """Return a message of a user in the chat template of a model, up to where the answer begins.

    A template is code of the model's author: it runs in jinja2's sandbox.

    Raises:
        InputError: A file is not JSON.
        UsageError: There is no template, it cannot be rendered, or jinja2 is not installed.
    """
    folders = tuple(folders)
    path = find_file(folders, "tokenizer_config.json")
    config = {} if path is None else read_object(path)
    template = _template(config, folders)
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UsageError(
            "expected jinja2 for a chat template, found none; run: pip install 'kvsurgeon[report]'"
        ) from error
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    tokens = {name: _content(config[name]) for name in ("bos_token", "eos_token") if config.get(name)}
    messages = [{"role": "user", "content": message}]
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
    except Exception as error:  # of any type: the cause is the template
        raise UsageError(f"the chat template cannot be rendered: {describe_exception(error)}") from error


def _template(config: Mapping[str, Any], folders: tuple[Path, ...]) -> str:
    path = find_file(folders, "chat_template.jinja")
    if path is not None:
        return path.read_text("utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one.get("name") == "default"), None)
    if not isinstance(found, str):
        raise UsageError("expected chat_template.jinja or a chat template in tokenizer_config.json, found none")
    return found


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _raise(message: str) -> None:
    raise ValueError(message)
