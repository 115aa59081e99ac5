"""`generate` computes the cache of a prompt by `prefill.onnx`, if that is a part of the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx
import pytest
from decoders import CachedDecoder, Config

from kvsurgeon.io.locate import PREFILL_FILE
from kvsurgeon.runtime import TextGenerator
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


def write(folder: Path, passes: str = "separate-prefill", **config: object) -> Path:
    text = folder / "ids.txt"
    text.write_text(" ".join(map(str, range(61))))
    model = CachedDecoder(Config(**config)).model()
    run_and_save(model, Pipeline.parse(passes), folder / "model.onnx", text=text, effort="quick")
    return folder


@pytest.mark.parametrize("passes", [
    "separate-prefill",
    "retarget{cache=static,max-length=32},separate-prefill",
    "retarget{cache=new-tokens},separate-prefill",
    "quantize-cache{bits=4},separate-prefill",
    "window-cache{window=3,sinks=1},separate-prefill",
    "swiftkv{after=1},separate-prefill",
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_prompts_of_several_lengths_are_continued_alike(tmp_path: Path, passes: str, dtype: str) -> None:
    folder = write(tmp_path, passes, windowed=(), dtype=dtype)
    split = TextGenerator(folder, threads=1)
    called = []
    assert split._prefill is not None
    run = split._prefill.run
    split._prefill.run = lambda *given: called.append(1) or run(*given)
    found = [split.generate(prompts, max_new_tokens=8).tokens for prompts in (PROMPTS, PROMPTS[0], [7])]
    assert called == [1, 1]  # a prompt of one token needs none

    (folder / PREFILL_FILE).unlink()
    whole = TextGenerator(folder, threads=1)
    assert found == [whole.generate(prompts, max_new_tokens=8).tokens for prompts in (PROMPTS, PROMPTS[0], [7])]


def test_the_second_model_of_other_weights_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, seed=1)
    onnx.save(CachedDecoder(Config(seed=2)).model(), tmp_path / "model.onnx")
    assert TextGenerator(tmp_path, threads=1)._prefill is None


def test_the_second_model_of_another_node_is_not_used(tmp_path: Path) -> None:
    write(tmp_path)
    model = onnx.load(tmp_path / PREFILL_FILE)
    next(node for node in model.graph.node if node.op_type == "Mul").op_type = "Add"
    onnx.save(model, tmp_path / PREFILL_FILE)
    assert TextGenerator(tmp_path, threads=1)._prefill is None


def test_weights_in_another_file_are_compared_by_their_place(tmp_path: Path) -> None:
    save = partial(onnx.save, save_as_external_data=True, location="w.data", size_threshold=1024)
    (tmp_path / "source").mkdir()
    save(CachedDecoder().model(), tmp_path / "source" / "model.onnx")
    run_and_save(tmp_path / "source", Pipeline.parse("separate-prefill"), tmp_path / "out")
    assert TextGenerator(tmp_path / "out", threads=1)._prefill is not None


def test_another_file_of_that_name_is_not_used(tmp_path: Path) -> None:
    onnx.save(CachedDecoder().model(), tmp_path / "model.onnx")
    onnx.save(CachedDecoder().model(), tmp_path / PREFILL_FILE)
    assert TextGenerator(tmp_path, threads=1)._prefill is None
