"""Make the shared test modules and the tools importable from every folder, and add `--update-goldens`."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tools")]

collect_ignore = [
    "clients",  # scripts, each of which installs a client: see its README
    "corpus",  # its script needs PyTorch, and doctests would import it
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the results in golden files")
