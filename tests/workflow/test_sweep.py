"""A sweep runs, verifies and measures a pipeline for several values of its options."""

from __future__ import annotations

import onnx
import pytest
from decoders import Config, Decoder

from kvsurgeon.cli.main import run
from kvsurgeon.errors import UsageError
from kvsurgeon.workflow.sweep import expand_choices, sweep


def test_options_without_choices_stay():
    assert expand_choices("inject,merge-kv-heads{kv-heads=1}") == ["inject,merge-kv-heads{kv-heads=1}"]


def test_choices_of_several_options_are_combined():
    assert expand_choices("a{x=1|2},b{y=3|4}") == ["a{x=1},b{y=3}", "a{x=1},b{y=4}", "a{x=2},b{y=3}", "a{x=2},b{y=4}"]


def test_a_smaller_cache_loses_more_and_a_plot_shows_it(tmp_path, capsys):
    onnx.save(Decoder(Config(layers=1, windowed=())).model(), tmp_path / "model.onnx")
    arguments = ["--sweep", "inject,window-cache{window=2|40,sinks=1}", "-o", str(tmp_path / "loss.png")]
    assert run(["plot", str(tmp_path / "model.onnx"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(size in shown for size in ("512.0 KiB", "384 B", "5.1 KiB"))
    losses = [point.kl_divergence for point in sweep(tmp_path / "model.onnx", arguments[1])]
    assert losses[1] > losses[2] >= losses[0] == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_passes_that_do_not_change_the_cache_are_rejected():
    with pytest.raises(UsageError, match="state the size of the cache"):
        list(sweep(Decoder(Config(layers=1)).model(), "add-position-ids"))
