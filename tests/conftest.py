"""Make the shared test modules importable from every folder, and add `--update-goldens`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = [
    "clients",  # scripts, each of which installs a client: see its README
    "corpus",  # its script needs PyTorch, and doctests would import it
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the results in golden files")
