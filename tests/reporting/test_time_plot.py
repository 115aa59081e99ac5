"""The plot of time per token, as text and as PNG."""

import struct

from kvsurgeon.reporting import time_plot


def test_a_growing_series_rises_and_a_constant_one_does_not():
    text = time_plot.plot_text({"grows": [n / 1000 for n in range(1, 41)], "stays": [0.001] * 40}, width=20, height=8)
    lines = text.splitlines()
    assert lines[0].split() == ["40.0", "ms", "┤", "●●"]
    assert lines[7].startswith("  0.0 ms ┤")
    assert lines[7].count("○") == 20
    assert lines[-1] == " ● grows   ○ stays"
    assert lines[4].startswith(" 17.1 ms ┤")
    assert lines[-2].split() == ["1", "20", "40"]


def test_a_shorter_series_ends_earlier():
    text = time_plot.plot_text({"long": [0.002] * 10, "short": [0.001] * 5}, width=10, height=4)
    assert sum(line.count("○") for line in text.splitlines()[:4]) == 5


def test_zero_times_have_no_marker():
    assert "●" not in "".join(time_plot.plot_text({"none": [0.0, 0.0]}, width=4, height=3).splitlines()[:3])


def test_the_png_has_its_size(tmp_path):
    time_plot.save_plot({"a": [0.001, 0.002], "b": [0.001]}, tmp_path / "time.png", title="Time")
    data = (tmp_path / "time.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 675)
