from __future__ import annotations

from pathlib import Path

import pytest

from kvsurgeon.errors import InputError
from kvsurgeon.io import find_model


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("present", "found"),
    [
        (["a.onnx"], "a.onnx"),
        (["a.onnx", "model.onnx"], "model.onnx"),
        (["a.onnx", "onnx/model.onnx"], "onnx/model.onnx"),
        (["model.onnx", "onnx/model.onnx"], "model.onnx"),
    ],
)
def test_a_folder_is_a_path_of_its_model(tmp_path: Path, present: list[str], found: str) -> None:
    touch(tmp_path, *present)
    assert find_model(tmp_path) == tmp_path / found
    assert find_model(str(tmp_path / found)) == tmp_path / found


def test_several_models_in_a_folder_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "b.onnx", "a.onnx")
    with pytest.raises(InputError, match=r"found 2: a\.onnx, b\.onnx; give the path"):
        find_model(tmp_path)


def test_a_long_list_of_models_is_shortened(tmp_path: Path) -> None:
    touch(tmp_path, *(f"m{number}.onnx" for number in range(10)))
    with pytest.raises(InputError, match=r"found 10: .*m7\.onnx and 2 more"):
        find_model(tmp_path)


def test_a_missing_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected an \.onnx file in .* found none"):
        find_model(tmp_path)
    with pytest.raises(InputError, match="found nothing at"):
        find_model(tmp_path / "absent")
