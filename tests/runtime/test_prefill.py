"""`generate` computes the cache of a prompt by `prefill.onnx`, if that computes the cache of the model."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from decoders import CachedDecoder, Config

from kvsurgeon.errors import ParityError
from kvsurgeon.io.locate import PREFILL_FILE
from kvsurgeon.runtime import TextGenerator
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


def write(folder: Path, passes: str = "separate-prefill", **config: object) -> Path:
    run_and_save(CachedDecoder(Config(**config)).model(), Pipeline.parse(passes), folder / "model.onnx")
    return folder


@pytest.mark.parametrize("passes", [
    "separate-prefill",
    "retarget{cache=static,max-length=32},separate-prefill",
    "retarget{cache=new-tokens},separate-prefill",
    "quantize-cache{bits=4},separate-prefill",
    "window-cache{window=3,sinks=1},separate-prefill",
])  # fmt: skip
def test_prompts_of_several_lengths_are_continued_alike(tmp_path: Path, passes: str) -> None:
    folder = write(tmp_path, passes, windowed=())
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


def test_the_second_model_of_other_weights_is_rejected(tmp_path: Path) -> None:
    write(tmp_path, seed=1)
    onnx.save(CachedDecoder(Config(seed=2)).model(), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"another `past_key_values\.0\.key`"):
        TextGenerator(tmp_path, threads=1)


def test_another_file_of_that_name_is_not_used(tmp_path: Path) -> None:
    onnx.save(CachedDecoder().model(), tmp_path / "model.onnx")
    onnx.save(CachedDecoder().model(), tmp_path / PREFILL_FILE)
    assert TextGenerator(tmp_path, threads=1)._prefill is None
