"""All commands, in the order of `--help`. Each imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
from typer import Argument, Context, Option

from kvsurgeon.cli import pass_commands
from kvsurgeon.cli.config import Config, SaveConfig
from kvsurgeon.cli.config import save_config as write_config
from kvsurgeon.cli.help import PASSES as PASSES_SECTION
from kvsurgeon.cli.pass_commands import (
    CertificateFile,
    EffortOption,
    Force,
    Json,
    Link,
    MaxLoss,
    Model,
    Output,
    Pack,
    PerLayer,
    Seed,
    Text,
    Verify,
    target_names,
)
from kvsurgeon.cli.plots import plot
from kvsurgeon.errors import PluginError, UnsupportedError, UsageError
from kvsurgeon.workflow.registry import COMMANDS, PASSES, summary_of

SamplingSeed = Annotated[int, Option("--seed", min=0, help="Random seed.")]
Load = Annotated[
    list[Path] | None, Option("--load", metavar="FILE", help="Add the passes of a Python file; may be repeated.")
]
Provider = Annotated[
    str, Option(metavar="NAME", help="Execution provider of onnxruntime for the result: NAME or NAME{option=value}.")
]
CPU = "cpu"  # execution provider
DEMO = Path("kvsurgeon-demo")


def pass_names() -> list[str]:
    """Return the names of all passes, for the completion of a shell."""
    return [plugin.name for plugin in PASSES.plugins()]


def add_commands(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Add all commands to `app`; of the passes, only the one that `arguments` call is imported.

    Raises:
        PluginError: That pass cannot be loaded.
    """
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    app.command()(inspect)
    for plugin in PASSES.plugins():
        if plugin.name == called:
            app.command(plugin.name, rich_help_panel=PASSES_SECTION)(pass_commands.command_of(plugin))
        else:
            app.command(plugin.name, rich_help_panel=PASSES_SECTION, help=summary_of(plugin))(pass_commands.stub)
    for plugin, message in PASSES.conflicts():
        if plugin.name == called and plugin.name not in COMMANDS:
            raise PluginError(message)
    for command in (run, passes, targets, verify, plot, report, generate, demo):
        app.command()(cast(Callable[..., None], command))


def inspect(
    model: Model,
    target: Annotated[str | None, Option(metavar="NAME", help="Check the model against a target instead.")] = None,
    json: Json = False,
) -> None:
    """Show the attention layers of a model, and which of its properties are proved or assumed."""
    from kvsurgeon.passes.contract import Subject
    from kvsurgeon.reporting import json_output, table
    from kvsurgeon.workflow.build_target import check_target

    if target is None:
        decoder = Subject.of(model).decoder()
        table.print_result(table.decoder_table(decoder), json_output.decoder_json(decoder), json=json)
        return
    found = check_target(model, target)
    document = json_output.incompatibilities_json(target, found)
    table.print_result(table.incompatibility_list(target, found), document, json=json)
    if document["stops"]:
        raise typer.Exit(UnsupportedError.exit_code)


def run(
    context: Context,
    model: Model,
    pipeline: Annotated[
        list[str],
        Option(
            "--pipeline",
            "-p",
            help="Passes to run: a,b{option=value,list=1,2}; may be repeated.",
            autocompletion=pass_names,
        ),
    ],
    output: Output,
    verify: Verify = True,
    effort: EffortOption = "normal",
    seed: Seed = None,
    verify_each: Annotated[bool, Option("--verify-each", help="Verify after every pass.")] = False,
    trace: Annotated[Path | None, Option(metavar="DIR", help="Write the graph as text after each pass.")] = None,
    link_weights: Link = False,
    pack: Pack = False,
    force: Force = False,
    text: Text = None,
    per_layer: PerLayer = False,
    max_loss: MaxLoss = None,
    certificate: CertificateFile = None,
    load: Load = None,
    config: Config = None,
    save_config: SaveConfig = None,
    json: Json = False,
) -> None:
    """Run several passes in order."""
    from kvsurgeon.reporting.trace import trace_writer
    from kvsurgeon.workflow.pass_files import passes_with
    from kvsurgeon.workflow.pipeline import Pipeline

    pass_commands.run_pipeline(
        model, Pipeline.parse(",".join(pipeline), passes_with(load or ())), output,
        verify=verify, effort=effort, seed=seed, verify_each=verify_each,
        link_weights=link_weights, pack=pack, force=force, text=text, per_layer=per_layer,
        max_loss=max_loss, certificate=certificate, on_pass=None if trace is None else trace_writer(trace), json=json,
    )  # fmt: skip
    write_config(context, save_config)


def passes(
    name: Annotated[
        str | None, Argument(metavar="[NAME]", help="The pass to describe.", autocompletion=pass_names)
    ] = None,
    load: Load = None,
    json: Json = False,
) -> None:
    """List all passes, including those of installed packages, or describe one with its options."""
    from kvsurgeon.reporting import json_output, table
    from kvsurgeon.workflow.pass_files import passes_with

    known = passes_with(load or ())
    if name is None:
        found = json_output.passes_json(known)
        table.print_result(table.passes_table(found), found, json=json)
    else:
        one = json_output.pass_json(known.find(name))
        table.print_result(table.pass_table(one), one, json=json)


def targets(
    name: Annotated[
        str | None, Argument(metavar="[NAME]", help="The target to describe.", autocompletion=target_names)
    ] = None,
    json: Json = False,
) -> None:
    """List the runtimes and compilers that models can be built for, or describe one."""
    from kvsurgeon.reporting import json_output, table
    from kvsurgeon.targets import TARGETS

    if name is None:
        found = json_output.targets_json()
        table.print_result(table.targets_table(found), found, json=json)
    else:
        target = json_output.target_json(TARGETS.find(name).load())
        table.print_result(table.target_table(target), target, json=json)


def verify(
    original: Annotated[Path, Argument(metavar="ORIGINAL", help="The reference model; optional with --certificate.")],
    result: Annotated[
        Path | None, Argument(metavar="RESULT", help="The candidate model, with or without a cache.")
    ] = None,
    effort: EffortOption = "normal",
    seed: Seed = None,
    loss: Annotated[bool, Option("--loss", help="Measure the loss of accuracy instead.")] = False,
    text: Text = None,
    per_layer: PerLayer = False,
    certificate: Annotated[
        Path | None, Option(metavar="FILE", help="Confirm the certificate of RESULT instead.")
    ] = None,
    provider: Provider = CPU,
    json: Json = False,
) -> None:
    """Run two models on the same token sequences, whole and in chunks, and compare the results."""
    from kvsurgeon.reporting import table
    from kvsurgeon.reporting.progress import verification_progress
    from kvsurgeon.workflow.confirmation import confirm
    from kvsurgeon.workflow.loss import measure_loss
    from kvsurgeon.workflow.verification import verify_models

    measures_loss = loss or text is not None or per_layer
    if certificate is not None and (measures_loss or seed is not None or provider != CPU):
        raise UsageError(
            "--certificate repeats the verification of FILE; omit --seed, --provider, --loss, --text and --per-layer"
        )
    if measures_loss and provider != CPU:
        raise UsageError("expected verification with --provider, found --loss, --text or --per-layer; omit one")
    with verification_progress() as progress:
        if certificate is not None:
            model, given = (original, None) if result is None else (result, original)
            confirmed = confirm(certificate, model, given, progress=progress)
            shown, document, exit_code = table.confirmation_table(confirmed), confirmed.as_dict(), 0
        elif result is None:
            raise UsageError("expected ORIGINAL and RESULT, or a model and --certificate FILE, found one model")
        elif measures_loss:
            lost = measure_loss(original, result, text=text, per_layer=per_layer, progress=progress)
            shown, document, exit_code = table.loss_table(lost), lost.as_dict(), 0
        else:
            found = verify_models(original, result, effort=effort, seed=seed, provider=provider, progress=progress)
            shown, document = table.report_table(found), found.as_dict()
            exit_code = {"same": 0, "different": 1, "unknown": 3}[found.verdict]
    table.print_result(shown, document, json=json)
    raise typer.Exit(exit_code)


def report(
    model: Model,
    against: Annotated[
        Path | None, Option(metavar="OTHER", help="A second model. [default: MODEL with a cache]")
    ] = None,
    prompt: Annotated[str | None, Option(help="A text, or token ids such as 1,2,3. [default: a short text]")] = None,
    tokens: Annotated[int, Option(min=0, help="Generated tokens to measure the time of; 0 to run no model.")] = 32,
    verify: Annotated[bool, Option("--verify/--no-verify", help="Verify the second model against MODEL.")] = False,
    effort: EffortOption = "normal",
    seed: Seed = None,
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write a page on a model, or on two: cache, masks, proof, attention weights, keys, time per token, graph."""
    from kvsurgeon.reporting.page.build import build_page
    from kvsurgeon.reporting.progress import verification_progress

    with verification_progress() as progress:
        build_page(
            model, output, against=against, prompt=prompt, tokens=tokens, verify=verify, effort=effort, seed=seed,
            progress=progress,
        )  # fmt: skip
    print(f"written to {output}")


def generate(
    model: Model,
    prompt: Annotated[str | None, Option(help="A text to continue, or token ids such as 1,2,3.")] = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="A prompt in each line, to be continued side by side.")
    ] = None,
    rows: Annotated[int, Option(min=1, help="Maximum number of prompts that are continued at a time.")] = 8,
    chat: Annotated[
        bool, Option("--chat", help="Answer the prompt as a message of a user, by the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of generated tokens.")] = 64,
    cache: Annotated[bool, Option("--cache/--no-cache", help="Use the cache if the model has one.")] = True,
    temperature: Annotated[float, Option(help="Sampling temperature; 0 for greedy decoding.")] = 0.0,
    top_k: Annotated[int, Option(help="Sample from the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    seed: SamplingSeed = 0,
    ids: Annotated[
        bool, Option("--ids", help="Read and print token ids, such as 1,2,3, without the tokenizer.")
    ] = False,
    provider: Provider = CPU,
) -> None:
    """Generate text, and show its speed."""
    from kvsurgeon.reporting.generation import print_all, print_generation
    from kvsurgeon.runtime import Sampling, TextGenerator

    if (prompt is None) == (prompts is None):
        raise UsageError(f"expected one of --prompt and --prompts, found {'none' if prompt is None else 'both'}")
    if chat and (ids or prompts is not None):
        raise UsageError(f"expected --chat with --prompt and a text, found {'--ids' if ids else '--prompts'}")
    sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=None if top_p == 1 else top_p, seed=seed)
    generator = TextGenerator(model, cached=None if cache else False, provider=provider)
    if ids:
        generator.tokenizer = None
    if prompt is not None:
        text = generator.encode_chat(prompt) if chat else prompt
        print_generation(generator, text, max_new_tokens=max_new_tokens, sampling=sampling)
    elif prompts is not None:
        print_all(generator, prompts, rows=rows, max_new_tokens=max_new_tokens, sampling=sampling)


def demo(
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder to write.")] = DEMO,
    export_only: Annotated[
        bool, Option("--export-only", help="Only write the model: an export without a cache.")
    ] = False,
) -> None:
    """Inspect, inject, verify and generate with a small built-in model, and plot the time per token."""
    from kvsurgeon.cli.demo import show_demo, write_export

    if export_only:
        write_export(output)
    else:
        show_demo(output)
