"""Code blocks of the docs, and what the words behind their language say.

A block of `sh` or `python` runs as it is written, after those before it on its page. `title="FILE"` writes the block to
a file first. `skip="REASON"` states why a block does not run here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

RUNNABLE = ("sh", "python")
_FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
_INFO = re.compile(r'(?P<language>\w*)(?: title="(?P<title>[^"]+)")?(?P<mark> skip="(?P<skip>[^"]+)")?')


@dataclass(frozen=True, kw_only=True)
class Block:
    """A code block.

    Attributes:
        page: The file that contains it.
        line: Number of its first line of code.
        language: Its language; empty if it has none.
        title: The file that it is the content of, if any.
        skip: Why it does not run; None if it does, or if its language is not one that runs.
        code: Its content.
    """

    page: Path
    line: int
    language: str
    title: str | None
    skip: str | None
    code: str

    @property
    def runs(self) -> bool:
        """Whether a new user can run it as it is."""
        return self.language in RUNNABLE and self.skip is None


def blocks_of(page: Path) -> list[Block]:
    """Return the code blocks of a page in order.

    Raises:
        ValueError: The words behind a language are not known.
    """
    text = page.read_text("utf-8")
    return [_block(page, text, found) for found in _FENCED.finditer(text)]


def prose_of(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return _FENCED.sub("", page.read_text("utf-8"))


def without_marks(text: str) -> str:
    r"""Return the text of a page as the site shows it, without reasons to skip a block.

    >>> without_marks('```sh skip="needs a network"\nls\n```')
    '```sh\nls\n```'
    """
    return re.sub(r'^(```.*?) skip="[^"]*"$', r"\1", text, flags=re.MULTILINE)


def _block(page: Path, text: str, found: re.Match[str]) -> Block:
    line = text.count("\n", 0, found.start(2)) + 1
    info = _INFO.fullmatch(found[1])
    if info is None:
        raise ValueError(f'{page}:{line}: expected LANGUAGE title="FILE" skip="REASON", found {found[1]!r}')
    return Block(page=page, line=line, language=info["language"], title=info["title"], skip=info["skip"], code=found[2])
