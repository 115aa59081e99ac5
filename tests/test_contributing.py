"""CONTRIBUTING.md names the places of each kind of addition: they exist, and no other file of src names the example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
SECTIONS = {
    title: (example, re.findall(r"^- `([^`]+)`: ", body, re.MULTILINE))
    for title, example, body in re.findall(
        r"^## Add (.+)\n\nExample: `([^`]+)`((?:(?!^## ).*\n?)*)", TEXT, re.MULTILINE
    )
}


def names(example: str) -> re.Pattern[str]:
    """Match an example's name as an option, or at the start of a class."""
    title = "".join(word[:1].upper() + word[1:] for word in example.split("-"))
    return re.compile(rf"(?<![\w-]){example}(?![\w-])|(?<!\w){title}")


def mentions(path: Path, example: str) -> bool:
    return bool(names(example).search(path.read_text("utf-8")))


def test_each_kind_of_addition_has_a_section():
    assert list(SECTIONS) == ["an operator", "a pass", "a target", "a cache mode"]


@pytest.mark.parametrize("title", SECTIONS)
def test_the_places_exist_and_name_the_example(title):
    example, places = SECTIONS[title]
    for place in places:
        assert (ROOT / place).is_file(), place
        assert mentions(ROOT / place, example) or example.replace("-", "_") in place, place


@pytest.mark.parametrize("title", SECTIONS)
def test_no_other_file_of_src_names_the_example(title):
    example, places = SECTIONS[title]
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py") if mentions(path, example)}
    assert found <= set(places)
