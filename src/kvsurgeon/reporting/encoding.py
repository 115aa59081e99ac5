"""Characters that the encoding of a terminal lacks."""

from __future__ import annotations

import codecs
import sys

_ASCII = {
    "✓": "+", "✗": "x", "…": "...", "●": "*", "○": "o", "▲": "^", "△": "v", "─": "-", "│": "|", "└": "+", "┤": "+",
}  # fmt: skip
_HANDLER = "kvsurgeon.ascii"


def replace_unencodable() -> None:
    """Replace characters that the encodings of stdout and stderr lack, instead of raising an error."""
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)


def _replace(error: UnicodeError) -> tuple[str, int]:
    r"""Return ASCII text for the characters of an error, as `codecs.register_error` requires.

    >>> print(*_replace(UnicodeEncodeError("ascii", "✓°", 0, 2, "")))
    +\xb0 2
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode() for char in found), error.end
