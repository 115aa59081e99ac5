"""The vocabulary check finds replaced words in names and in prose, and keeps quiet about standard terms."""

from __future__ import annotations

import re

import check_words
import pytest


def words(path, text):
    path.write_text(text, "utf-8")
    return [(finding.line, finding.word) for finding in check_words.check(path)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("class HeldWeights:\n    pass\n", [(1, "Held")]),
        ("def is_seen(peek): ...\n", [(1, "seen"), (1, "peek")]),
        ("x = 1  # as it was\n", [(1, "as it was")]),
        ('"""Let the graph be."""\n', [(1, "Let")]),
        ('"""One.\n\nTwo islands.\n"""\n', [(3, "islands")]),
        ('message = "what the judge said"\n', [(1, "judge")]),
        ("room = 1\n", [(1, "room")]),
        ('"""Return the analysis of a dequantised model."""\n', [(1, "dequantised")]),
        ('choice = "in-place"\n', [(1, "in-place")]),
        ("def stand_in(): ...\n", [(1, "stand")]),
        ("system = opened = expanded = context = 1\n", []),
        ('"""Update the buffer in place; give host inputs."""\n', []),
        ("class HostInputs:\n    host_inputs: int\n", []),
    ],
)
def test_python(tmp_path, text, found):
    assert words(tmp_path / "module.py", text) == found


def test_markdown(tmp_path):
    text = "The verifier compares.\nThe judge is told.\n`--idiom grow`\n"
    assert words(tmp_path / "page.md", text) == [(2, "judge"), (2, "told"), (3, "--idiom")]


def test_a_file_name_is_checked(tmp_path):
    assert words(tmp_path / "glances.py", "") == [(1, "glances")]
    assert words(tmp_path / "two_islands.py", "") == [(1, "islands")]


def test_every_exception_has_a_reason_and_is_needed():
    texts = [path.read_text("utf-8") for path in check_words.files(check_words.default_paths())]
    for allowance in check_words.ALLOWED:
        assert allowance.reason
        assert any(re.search(allowance.text, text, re.IGNORECASE) for text in texts), allowance.text
