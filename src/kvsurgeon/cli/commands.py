"""Every command, in the order in which `--help` lists them. What a command needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from kvsurgeon.cli import operations
from kvsurgeon.errors import PluginError, UnsupportedError
from kvsurgeon.workflow.registry import COMMANDS, PASSES, summary_of

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file or a folder that holds one.")]
Json = Annotated[bool, typer.Option("--json", help="Answer for a program.")]


def add_commands(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Add all commands to `app`; of the passes only the one that `arguments` call is imported.

    Raises:
        PluginError: That pass cannot be had.
    """
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    app.command()(inspect)
    for plugin in PASSES.plugins():
        if plugin.name == called:
            app.command(plugin.name)(operations.command_of(plugin))
        else:
            app.command(plugin.name, help=summary_of(plugin))(operations.stub)
    for plugin, message in PASSES.conflicts():
        if plugin.name == called and plugin.name not in COMMANDS:
            raise PluginError(message)
    for command in (run, passes, targets, verify, plot, generate, demo):
        app.command()(cast(Callable[..., None], command))


def inspect(
    model: Model,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="NAME", help="Say instead what stands between the model and a target."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the attention layers, and what was proved of the model and what is assumed."""
    from kvsurgeon.passes.contract import Subject
    from kvsurgeon.report import answer, table

    if target is not None:
        _inspect_for(model, target, json=json)
        return
    decoder = Subject.of(model).decoder()
    if json:
        answer.show(answer.anatomy(decoder))
    else:
        table.console().print(table.anatomy(decoder))


def _inspect_for(model: Path, target: str, *, json: bool) -> None:
    from kvsurgeon.report import answer, table
    from kvsurgeon.workflow.delivery import stands_between

    found = stands_between(model, target)
    if json:
        answer.show(answer.obstacles(target, found))
    else:
        table.console().print(table.obstacles(target, found))
    if any(obstacle.stops for obstacle in found):
        raise typer.Exit(UnsupportedError.exit_code)


def run(
    model: Model,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="Passes: a,b{option=value,list=1,2}.")],
    output: operations.Output,
    verify: operations.Verify = True,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Run the judge after every pass.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="DIR", help="Write the graph as text before and after each pass."),
    ] = None,
    copy_weights: operations.Copy = False,
    pack: operations.Pack = False,
    text: operations.Text = None,
    per_layer: operations.PerLayer = False,
    json: Json = False,
) -> None:
    """Run several passes, one after the other."""
    from kvsurgeon.workflow.pipeline import Pipeline

    parsed = Pipeline.parse(pipeline)
    operations.operate(
        model,
        parsed,
        output,
        verify=verify,
        verify_each=verify_each,
        copy_weights=copy_weights,
        pack=pack,
        text=text,
        per_layer=per_layer,
        trace=trace,
        json=json,
    )


def passes(json: Json = False) -> None:
    """List the passes that there are, those of installed packages included."""
    from kvsurgeon.report import answer, table

    found = answer.passes()
    if json:
        answer.show(found)
    else:
        table.console().print(table.passes(found))


def targets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The one to describe.")] = None,
    json: Json = False,
) -> None:
    """List the runtimes and compilers that a model can be brought to, or describe one."""
    from kvsurgeon.report import answer, table
    from kvsurgeon.targets import TARGETS

    listed = answer.targets() if name is None else []
    described = {} if name is None else answer.target(TARGETS.find(name).load())
    if json:
        answer.show(described or listed)
    else:
        table.console().print(table.target(described) if described else table.targets(listed))


def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The model as it was.")],
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="The model as it is now, with a cache or without.")],
    seed: Annotated[int, typer.Option(min=0, help="Where the texts come from that both are given.")] = 0,
    loss: Annotated[bool, typer.Option("--loss", help="Say how much is lost, not whether anything is.")] = False,
    text: operations.Text = None,
    per_layer: operations.PerLayer = False,
    json: Json = False,
) -> None:
    """Run both models on the same texts, whole and in chunks, and say whether they agree, or by how much not."""
    if loss or text is not None or per_layer:
        operations.lost(original, result, text=text, per_layer=per_layer, json=json)
    else:
        raise typer.Exit(operations.judged(original, result, seed=seed, json=json))


def plot(
    model: Model,
    layer: Annotated[int, typer.Option(min=0, help="The attention layer, counted in execution order.")] = 0,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="A text, or token ids such as 1,2,3. A short text is taken if none is given."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="OTHER", help="Another model, drawn beside it: what a pass made of it."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The picture. [default: <model>_layer_<i>_gqa_keys.png, here]"
        ),
    ] = None,
) -> None:
    """Draw the keys of a layer: a row for each group of query heads that share one, a column for each of them."""
    from kvsurgeon.report import grid
    from kvsurgeon.workflow.keys import capture_keys

    sides = [capture_keys(one, layer=layer, prompt=prompt) for one in (model, against) if one is not None]
    print(f"written to {grid.write(grid.draw(sides), output or grid.file_name(sides[0]))}")


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue, or token ids: 1,2,3.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Use the model's cache, if it has one.")] = True,
    temperature: Annotated[float, typer.Option(help="0 chooses the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among so many of the likeliest; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that together have this share.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Where chance comes from.")] = 0,
) -> None:
    """Continue a text, showing it as it is made, and say how fast that was."""
    from kvsurgeon.report import stream
    from kvsurgeon.runtime import Sampling, Writer

    sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=None if top_p == 1 else top_p, seed=seed)
    writer = Writer(model, cached=None if cache else False)
    stream.show(writer, prompt, max_new_tokens=max_new_tokens, sampling=sampling)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to put what it makes.")] = Path(
        "kvsurgeon-demo"
    ),
) -> None:
    """Inspect, inject, verify and generate on a small model that comes along, and plot the time per token."""
    from kvsurgeon.cli.demo import show_demo

    show_demo(output)
