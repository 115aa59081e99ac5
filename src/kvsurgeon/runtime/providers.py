"""Execution providers of onnxruntime, by short names with options."""

from __future__ import annotations

import re

import onnxruntime as ort

from kvsurgeon.errors import UsageError, did_you_mean

CPU = "cpu"
_SUFFIX = "ExecutionProvider"
_WRITTEN = re.compile(r"(?P<name>\w+)(?:\{(?P<options>[^{}]*)\})?")


def find_provider(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the options of an execution provider of the installed onnxruntime.

    >>> find_provider("cpu")
    ('CPUExecutionProvider', {})
    >>> find_provider("CPUExecutionProvider{arena_extend_strategy=kSameAsRequested}")
    ('CPUExecutionProvider', {'arena_extend_strategy': 'kSameAsRequested'})

    Raises:
        UsageError: There is none of that name, or the text is malformed.
    """
    match = _WRITTEN.fullmatch(text.strip())
    options = [option.partition("=") for option in (match["options"] or "").split(",") if option] if match else []
    if match is None or not all(key.strip() and equals for key, equals, _ in options):
        raise UsageError(f"expected a provider such as cuda{{device_id=1}}, found {text!r}")
    installed = {name.removesuffix(_SUFFIX).lower(): name for name in ort.get_available_providers()}
    name = match["name"].removesuffix(_SUFFIX).lower()
    if name not in installed:
        raise UsageError(f"the installed onnxruntime has no provider {name}; {did_you_mean(name, installed)}")
    return installed[name], {key.strip(): value.strip() for key, _, value in options}
