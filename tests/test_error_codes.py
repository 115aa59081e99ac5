"""docs/errors.md describes every code of an error, and src raises every code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kvsurgeon import errors
from kvsurgeon.errors import Code

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvsurgeon"
ERRORS = (ROOT / "docs" / "errors.md").read_text("utf-8")


def sections():
    """Yield class, code and text of each code's section in docs/errors.md."""
    for part in ERRORS.split("\n## ")[1:]:
        name = part.partition("\n")[0]
        for section in part.split("\n### ")[1:]:
            code, _, text = section.partition(": ")
            yield name, code, text


SECTIONS = list(sections())
CODES = [code for _, code, _ in SECTIONS]


def test_every_code_has_a_section_and_every_section_a_code():
    assert sorted(CODES) == sorted(code.value for code in Code)


@pytest.mark.parametrize(("name", "code", "text"), SECTIONS, ids=CODES)
def test_a_code_is_described_by_cause_message_and_remedy(name, code, text):
    assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Cause", "Message", "Remedy"]
    assert code[4] == str(getattr(errors, name).exit_code), "the first digit is the exit code of the class"


def messages():
    """Yield a pattern for each text of src with at least three words, with `.*` for the placeholders of f-strings."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            written = "".join(text for text in texts if isinstance(text, str))
            if len(re.findall(r"[a-zA-Z]{2,}", written)) > 2:
                yield re.compile("".join(re.escape(text) if isinstance(text, str) else ".*" for text in texts))


MESSAGES = list(messages())


@pytest.mark.parametrize("text", [text for _, _, text in SECTIONS], ids=CODES)
def test_the_example_of_a_code_is_a_message_of_the_source(text):
    ((_, message),) = re.findall(r"^\*\*Message\.\*\* (`{1,2}) ?(.*?) ?\1$", text, re.MULTILINE)
    assert any(pattern.search(message) for pattern in MESSAGES), message


def raised_codes():
    """Yield the codes that src names, and the default codes of the classes that it raises without one."""
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.KvsurgeonError)]
    defaults = {one.__name__: one.code.name for one in classes}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))) if path.name != "errors.py" else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Code":
                yield node.attr
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in defaults:
                named = any(keyword.arg == "code" for keyword in node.keywords)
                yield from () if named else (defaults[node.func.id],)


def test_every_code_is_raised_somewhere():
    assert {code.name for code in Code} <= set(raised_codes())


def test_every_unsupported_error_names_a_code():
    unnamed = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "UnsupportedError"
        if all(keyword.arg != "code" for keyword in node.keywords)
    ]
    assert not unnamed
