"""The image of keys: a row for each group, the keys of each query head in a cell, no overlaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvsurgeon
from kvsurgeon.cli.main import run
from kvsurgeon.errors import UsageError
from kvsurgeon.reporting import key_grid
from kvsurgeon.workflow.keys import Keys, capture_keys

DEMO = Path(kvsurgeon.__file__).parent / "demo" / "model"


def keys(query_heads: int, kv_heads: int, tokens: int = 5) -> Keys:
    values = np.random.default_rng(kv_heads).standard_normal((kv_heads, tokens, 16)).astype(np.float32)
    named = tuple(f"token {number}" for number in range(tokens))
    reads = tuple(head * kv_heads // query_heads for head in range(query_heads))
    return Keys(model="m", layer=2, reads=reads, keys=values, tokens=named)


@pytest.mark.parametrize(("query_heads", "kv_heads", "shape"), [(9, 3, (3, 3)), (12, 1, (1, 12))])
def test_a_row_for_each_group_and_a_column_for_each_query_head(query_heads, kv_heads, shape):
    given = keys(query_heads, kv_heads)
    figure = key_grid.draw_keys([given])
    found = [axes for axes in figure.axes if axes.images]
    assert len(found) == query_heads
    figure.canvas.draw()
    rows = {round(axes.get_window_extent().y0) for axes in found}
    columns = {round(axes.get_window_extent().x0) for axes in found}
    assert (len(rows), len(columns)) == shape
    for head, axes in enumerate(found):
        np.testing.assert_array_equal(axes.images[0].get_array(), given.keys[head // (query_heads // kv_heads)])


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "other"), [(9, 3, 9), (32, 8, None), (12, 12, 4), (12, 1, None), (7, 7, None)]
)
def test_cells_do_not_overlap(query_heads, kv_heads, other):
    sides = [keys(query_heads, kv_heads, tokens=24)]
    if other is not None:
        sides.append(keys(query_heads, other, tokens=24))
    figure = key_grid.draw_keys(sides)
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes if axes.images]
    for number, one in enumerate(boxes):
        assert one.width > 40
        assert one.height > 40
        for another in boxes[number + 1 :]:
            assert (
                min(one.x1, another.x1) - max(one.x0, another.x0) < 2
                or min(one.y1, another.y1) - max(one.y0, another.y0) < 2
            ), "two cells overlap"
    width, height = figure.canvas.get_width_height()
    assert min(min(box.x0, box.y0, width - box.x1, height - box.y1) for box in boxes) >= 0


def test_two_models_have_one_grid_and_one_scale():
    before, after = keys(9, 9), keys(9, 3)
    figure = key_grid.draw_keys([before, after])
    found = [axes for axes in figure.axes if axes.images]
    assert len(found) == 18
    assert len({axes.images[0].get_clim() for axes in found}) == 1
    titles = [axes.get_title() for axes in found]
    assert titles[:3] == ["query 0 reads KV 0", "query 1 reads KV 1", "query 2 reads KV 2"]
    assert titles[9:12] == ["query 0 reads KV 0", "query 1 reads KV 0", "query 2 reads KV 0"]
    rows = [axes.get_ylabel() for axes in found[::3]]
    assert rows == ["", "", "", "group 0", "group 1", "group 2"], "a row of the first model holds three heads"


def test_captured_keys_are_those_of_the_cache(tmp_path):
    captured = capture_keys(DEMO, layer=1, prompt="It was late.")
    assert (captured.model, captured.layer, captured.query_heads, captured.kv_heads) == ("model", 1, 8, 2)
    assert captured.tokens[0] == "It"
    path = kvsurgeon.inject(DEMO, tmp_path / "cached", verify=False).path
    again = capture_keys(path, layer=1, prompt="It was late.")
    np.testing.assert_allclose(again.keys, captured.keys, atol=1e-5)
    assert again.model == "cached"
    assert captured.keys.std() > 0.1


def test_the_command_draws_one_or_two_models(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["plot", str(DEMO), "--layer", "1", "--prompt", "It was late."]) == 0
    assert capsys.readouterr().out == "written to model_layer_1_gqa_keys.png\n"
    assert (tmp_path / "model_layer_1_gqa_keys.png").read_bytes().startswith(b"\x89PNG")
    assert run(["plot", str(DEMO), "--against", str(DEMO), "-o", "both.svg"]) == 0
    assert b"<svg" in (tmp_path / "both.svg").read_bytes()


def test_plot_returns_a_figure(tmp_path):
    figure = kvsurgeon.plot(DEMO, prompt=[1, 2, 3], output=tmp_path / "keys.png")
    assert len([axes for axes in figure.axes if axes.images]) == 8
    assert (tmp_path / "keys.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--layer", "6"], 2, "expected a layer from 0 to 5, found 6"),
        (["--prompt", ""], 2, "expected a value for each argument"),
        (["-o", "keys.nonsense"], 2, "cannot write `keys.nonsense`"),
        (["-o", "absent/keys.png"], 2, "cannot write `absent/keys.png`"),
        (["--against", "absent"], 4, "found nothing at `absent`"),
    ],
)
def test_errors_write_nothing(arguments, code, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(["plot", str(DEMO), *arguments]) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_tokenizer_the_prompt_is_token_ids(tmp_path):
    (tmp_path / "model.onnx").write_bytes((DEMO / "model.onnx").read_bytes())
    assert capture_keys(tmp_path, prompt="5, 6 7").tokens == ("5", "6", "7")
    assert len(capture_keys(tmp_path).tokens) == 9
    with pytest.raises(UsageError, match=r"a text and tokenizer\.json"):
        capture_keys(tmp_path, prompt="words")
