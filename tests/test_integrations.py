"""The GitHub Action and the pre-commit hooks: their commands verify a model, and fail if its results differ."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import yaml
from decoders import CachedDecoder, Config, Decoder

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models with spaces")
    onnx.save(Decoder(Config(layers=1)).model(), folder / "original.onnx")
    cached = CachedDecoder(Config(layers=1)).model()
    onnx.save(cached, folder / "cached.onnx")
    for tensor in cached.graph.initializer:
        if list(tensor.dims) == [Config().hidden, Config().vocabulary]:
            tensor.raw_data = onnx.numpy_helper.to_array(tensor)[::-1].tobytes()
    onnx.save(cached, folder / "wrong.onnx")
    return folder


def exit_code(command, **variables):
    """Run a command in a shell in which `kvsurgeon` is the one of this interpreter."""
    function = f'kvsurgeon() {{ "{sys.executable}" -m kvsurgeon "$@"; }}\n'
    return subprocess.run(["bash", "-c", function + command], env=os.environ | variables, check=False).returncode


def values(models, result):
    """Return what a workflow gives the action, the defaults of the action for the rest."""
    defaults = {name: one["default"] for name, one in ACTION["inputs"].items() if "default" in one}
    return {**defaults, "original": str(models / "original.onnx"), "result": str(models / result), "effort": "quick"}


@pytest.mark.parametrize(("result", "code"), [("wrong.onnx", 1), ("missing.onnx", 4)])
def test_the_action_fails_if_results_differ(models, result, code):
    install, verify = ACTION["runs"]["steps"]
    given = values(models, result)
    inputs = {name: re.fullmatch(r"\$\{\{ inputs\.(\w+) \}\}", text)[1] for name, text in verify["env"].items()}
    assert set(inputs.values()) == set(ACTION["inputs"]) == set(given)
    assert exit_code(verify["run"], **{name: given[option] for name, option in inputs.items()}) == code
    assert install["run"] == 'pip install "$GITHUB_ACTION_PATH"'
    assert not [step for step in (install, verify) if "${{" in step["run"]], "an input is a variable, not code"


def test_the_hook_that_verifies_succeeds_if_results_are_the_same(models):
    arguments = f'"{models}/original.onnx" "{models}/cached.onnx" --effort quick'
    assert exit_code(f"{HOOKS['kvsurgeon-verify']['entry']} {arguments}") == 0


def test_the_hook_that_inspects_names_a_target(models):
    command = f'{HOOKS["kvsurgeon-inspect"]["entry"]} "{models}/original.onnx"'
    assert exit_code(f"{command} --target nothing") == 2


def test_hooks_run_once_for_all_files():
    assert all(hook["language"] == "python" and hook["pass_filenames"] is False for hook in HOOKS.values())
    assert all(re.search(hook["files"], "a/model.onnx") for hook in HOOKS.values())
