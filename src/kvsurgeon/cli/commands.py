"""All commands, in the order of `--help`. Each imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from kvsurgeon.cli import pass_commands
from kvsurgeon.cli.pass_commands import Copy, Json, Model, Output, Pack, PerLayer, Text, Verify
from kvsurgeon.errors import PluginError, UnsupportedError
from kvsurgeon.workflow.registry import COMMANDS, PASSES, summary_of

_VERDICT_EXIT_CODES = {"same": 0, "different": 1, "unknown": 3}


def add_commands(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Add all commands to `app`; of the passes, only the one that `arguments` call is imported.

    Raises:
        PluginError: That pass cannot be loaded.
    """
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    app.command()(inspect)
    for plugin in PASSES.plugins():
        if plugin.name == called:
            app.command(plugin.name)(pass_commands.command_of(plugin))
        else:
            app.command(plugin.name, help=summary_of(plugin))(pass_commands.stub)
    for plugin, message in PASSES.conflicts():
        if plugin.name == called and plugin.name not in COMMANDS:
            raise PluginError(message)
    for command in (run, passes, targets, verify, plot, generate, demo):
        app.command()(cast(Callable[..., None], command))


def inspect(
    model: Model,
    target: Annotated[
        str | None, typer.Option("--target", metavar="NAME", help="Check the model against a target instead.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the attention layers of a model, and which of its properties are proved or assumed."""
    from kvsurgeon.passes.contract import Subject
    from kvsurgeon.report import json_output, table

    if target is not None:
        _inspect_target(model, target, json=json)
        return
    decoder = Subject.of(model).decoder()
    if json:
        json_output.print_json(json_output.decoder_json(decoder))
    else:
        table.console().print(table.decoder_table(decoder))


def _inspect_target(model: Path, target: str, *, json: bool) -> None:
    from kvsurgeon.report import json_output, table
    from kvsurgeon.workflow.build_target import check_target

    found = check_target(model, target)
    if json:
        json_output.print_json(json_output.incompatibilities_json(target, found))
    else:
        table.console().print(table.incompatibility_list(target, found))
    if any(one.blocking for one in found):
        raise typer.Exit(UnsupportedError.exit_code)


def run(
    model: Model,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="Passes to run: a,b{option=value,list=1,2}.")],
    output: Output,
    verify: Verify = True,
    verify_each: Annotated[bool, typer.Option("--verify-each", help="Verify after every pass.")] = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="DIR", help="Write the graph as text before and after each pass.")
    ] = None,
    copy_weights: Copy = False,
    pack: Pack = False,
    text: Text = None,
    per_layer: PerLayer = False,
    json: Json = False,
) -> None:
    """Run several passes in order."""
    from kvsurgeon.workflow.pipeline import Pipeline

    pass_commands.run_pipeline(
        model,
        Pipeline.parse(pipeline),
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
    """List all passes, including those of installed packages."""
    from kvsurgeon.report import json_output, table

    found = json_output.passes_json()
    if json:
        json_output.print_json(found)
    else:
        table.console().print(table.passes_table(found))


def targets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The target to describe.")] = None,
    json: Json = False,
) -> None:
    """List the runtimes and compilers that models can be built for, or describe one."""
    from kvsurgeon.report import json_output, table
    from kvsurgeon.targets import TARGETS

    listed = json_output.targets_json() if name is None else []
    described = {} if name is None else json_output.target_json(TARGETS.find(name).load())
    if json:
        json_output.print_json(described or listed)
    else:
        table.console().print(table.target_table(described) if described else table.targets_table(listed))


def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The reference model.")],
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="The candidate model, with or without a cache.")],
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    loss: Annotated[bool, typer.Option("--loss", help="Measure the loss of accuracy instead.")] = False,
    text: Text = None,
    per_layer: PerLayer = False,
    json: Json = False,
) -> None:
    """Run two models on the same token sequences, whole and in chunks, and compare the results."""
    from kvsurgeon.report import json_output, table
    from kvsurgeon.report.progress import verification_progress

    if loss or text is not None or per_layer:
        from kvsurgeon.workflow.loss import measure_loss

        with verification_progress() as progress:
            measured = measure_loss(original, result, text=text, per_layer=per_layer, progress=progress)
        document, shown, exit_code = measured.as_dict(), table.loss_table(measured), 0
    else:
        from kvsurgeon.workflow.verification import verify_models

        with verification_progress() as progress:
            found = verify_models(original, result, seed=seed, progress=progress)
        document, shown = found.as_dict(), table.report_table(found)
        exit_code = _VERDICT_EXIT_CODES[found.verdict]
    if json:
        json_output.print_json(document)
    else:
        table.console().print(shown)
    raise typer.Exit(exit_code)


def plot(
    model: Model,
    layer: Annotated[int, typer.Option(min=0, help="Attention layer, counted in execution order.")] = 0,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="A text, or token ids such as 1,2,3. [default: a short text]")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER", help="A second model to compare with.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Image file to write. [default: ./<model>_layer_<i>_gqa_keys.png]"
        ),
    ] = None,
) -> None:
    """Plot the keys of a layer: a row for each group of query heads that share a KV head, a column for each head."""
    from kvsurgeon.report import key_grid
    from kvsurgeon.workflow.keys import capture_keys

    sides = [capture_keys(one, layer=layer, prompt=prompt) for one in (model, against) if one is not None]
    path = output or key_grid.default_path(sides[0])
    key_grid.save_figure(key_grid.draw_keys(sides), path)
    print(f"written to {path}")


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="A text to continue, or token ids such as 1,2,3.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of generated tokens.")] = 64,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Use the cache if the model has one.")] = True,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 for greedy decoding.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
) -> None:
    """Generate text, and show its speed."""
    from kvsurgeon.report.generation import print_generation
    from kvsurgeon.runtime import Sampling, TextGenerator

    sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=None if top_p == 1 else top_p, seed=seed)
    writer = TextGenerator(model, cached=None if cache else False)
    print_generation(writer, prompt, max_new_tokens=max_new_tokens, sampling=sampling)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")] = Path(
        "kvsurgeon-demo"
    ),
) -> None:
    """Inspect, inject, verify and generate with a small built-in model, and plot the time per token."""
    from kvsurgeon.cli.demo import show_demo

    show_demo(output)
