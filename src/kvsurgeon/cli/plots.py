"""The command `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from kvsurgeon.cli.pass_commands import Model, Text


def plot(
    model: Model,
    layer: Annotated[int, Option(min=0, help="Attention layer, counted in execution order.")] = 0,
    prompt: Annotated[str | None, Option(help="A text, or token ids such as 1,2,3. [default: a short text]")] = None,
    against: Annotated[Path | None, Option(metavar="OTHER", help="A second model to compare with.")] = None,
    sweep: Annotated[
        str | None, Option(metavar="PASSES", help="Plot the loss of passes: window-cache{window=64|128}.")
    ] = None,
    text: Text = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="FILE", help="Image. [default: <model>_layer_<i>_gqa_keys.png, or loss.png]"),
    ] = None,
) -> None:
    """Plot the keys of a layer, or the accuracy loss of passes against the size of the cache.

    The keys have a row for each group of query heads that share a KV head, and a column for each head. Several values
    of an option have `|` between them.
    """
    from kvsurgeon.reporting import key_grid
    from kvsurgeon.workflow.keys import capture_keys

    if sweep is not None:
        _plot_loss(model, sweep, text, output or Path("loss.png"))
        return

    sides = [capture_keys(one, layer=layer, prompt=prompt) for one in (model, against) if one is not None]
    path = output or key_grid.default_path(sides[0])
    key_grid.save_figure(key_grid.draw_keys(sides), path)
    print(f"written to {path}")


def _plot_loss(model: Path, passes: str, text: Path | None, output: Path) -> None:
    """Plot the accuracy loss of passes against the size of the cache, and print a table of it."""
    from kvsurgeon.passes.contract import CACHE_TOKENS
    from kvsurgeon.reporting import table
    from kvsurgeon.reporting.loss_plot import save_loss_plot
    from kvsurgeon.reporting.progress import verification_progress
    from kvsurgeon.workflow.sweep import sweep

    with verification_progress() as progress:
        points = list(sweep(model, passes, text=text, progress=progress))
    save_loss_plot(points, output, tokens=CACHE_TOKENS)
    table.print_result(table.sweep_table(points), None, json=False)
    print(f"written to {output}")
