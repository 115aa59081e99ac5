"""Install the little packages of `tests/plugin` without a network: their modules, and what a wheel says of them."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

PACKAGES = Path(__file__).parent / "plugin"


def install(name: str, site: Path) -> Path:
    """Return `site`, in which `tests/plugin/NAME` now is as pip would put it there."""
    folder = PACKAGES / name
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    for module in folder.glob("*_passes"):
        shutil.copytree(module, site / module.name, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site
