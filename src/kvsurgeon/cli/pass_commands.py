"""The command of each pass, made from its fields and its docstring, and the options that these commands share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvsurgeon.cli.config import Config, SaveConfig
from kvsurgeon.cli.config import save_config as write_config
from kvsurgeon.errors import PluginError, UsageError
from kvsurgeon.plugins import Plugin
from kvsurgeon.workflow.registry import PASSES

if TYPE_CHECKING:
    from kvsurgeon.passes.options import Option
    from kvsurgeon.workflow.pipeline import Pipeline, PipelineRun


def target_names() -> list[str]:
    """Return the names of all targets, for the completion of a shell."""
    from kvsurgeon.targets import TARGETS

    return [plugin.name for plugin in TARGETS.plugins()]


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file or a folder that holds one.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The .onnx file or folder to write.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Verify against the original, or skip it.")]
Link = Annotated[
    bool, typer.Option("--link-weights", help="Link external data into another folder instead of copying it.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace data files and side files of other content.")]
Pack = Annotated[bool, typer.Option("--pack", help="Write all weights to one new file and drop unused ones.")]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Text: the first half to calibrate on, the second to measure the loss. [default: built-in]"
    ),
]
PerLayer = Annotated[bool, typer.Option("--per-layer", help="Measure the loss of each attention layer too.")]
MaxLoss = Annotated[
    float | None,
    typer.Option(metavar="NATS", min=0, help="Write nothing if the KL divergence per token is larger. [default: any]"),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Random seed of the texts. [default: drawn, and printed]")]
EffortOption = Annotated[
    Literal["quick", "normal", "thorough"],
    typer.Option("--effort", help="How much to verify: texts, batches, lengths."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CertificateFile = Annotated[
    Path | None, typer.Option("--certificate", metavar="FILE", help="Write a certificate of the result.")
]
TargetName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Write the folder that this client loads.", autocompletion=target_names),
]
_HAS_TARGETS = "inject"  # the pass with the option --target


def stub() -> None:
    """Do nothing: the command of a pass that is listed but not called, and so not imported."""


def command_of(plugin: Plugin[type[Any]]) -> Callable[..., None]:
    """Return the command of a pass: its fields are the options, its docstring is the help.

    Raises:
        PluginError: The pass cannot be imported, or one of its options has the name of a shared option.
    """
    from kvsurgeon.passes.options import build, options_of
    from kvsurgeon.workflow.pipeline import Pipeline

    pass_class = plugin.load()
    options = options_of(pass_class)
    defaults = {option.field: option.default for option in options}

    def command(model: Path, output: Path, context: typer.Context, save_config: Path | None, **given: Any) -> None:
        shared = {name: given.pop(name) for name in list(given) if name not in defaults}
        target = shared.pop("target", None)
        del shared["config"]  # whose options are among those given
        texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
        texts = {name: text for name, text in texts.items() if text is not None}
        wanted = build(pass_class, plugin.name, texts)
        if target is None:
            run_pipeline(model, Pipeline((wanted,)), output, **shared)
        else:
            changed = {name: getattr(wanted, name) for name in texts if getattr(wanted, name) != defaults.get(name)}
            _build_for(target, model, output, changed, **shared)
        write_config(context, save_config)

    shared = [_parameter("model", Model), _parameter("output", Output), _parameter("verify", Verify, True)]
    shared += [_parameter("effort", EffortOption, "normal"), _parameter("seed", Seed, None)]
    shared += [_parameter("config", Config, None), _parameter("save_config", SaveConfig, None)]
    shared.append(_parameter("certificate", CertificateFile, None))
    for name, annotation in (("link_weights", Link), ("pack", Pack), ("force", Force), ("json", Json)):
        shared.append(_parameter(name, annotation, False))
    if not getattr(pass_class, "exact", True):
        shared += [_parameter("text", Text, None), _parameter("per_layer", PerLayer, False)]
        shared.append(_parameter("max_loss", MaxLoss, None))
    if plugin.built_in and plugin.name == _HAS_TARGETS:
        shared.append(_parameter("target", TargetName, None))
    taken = {one.name for one in shared} & set(defaults)
    if taken:
        raise PluginError(
            f"pass {plugin.name} of {plugin.package}: its option {min(taken)} has the name of a shared option"
        )
    parameters = [*shared[:2], *map(_option, options), *shared[2:], _parameter("context", typer.Context)]
    command.__doc__ = _help(pass_class)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def passes_with(option: str) -> str:
    """Return a remark on the built-in passes that have an option, for a command that does not; empty if none has."""
    from kvsurgeon.passes.options import options_of

    built_in = [plugin for plugin in PASSES.plugins() if option and plugin.built_in]
    found = [one.name for one in built_in if option in {f"--{known.name}" for known in options_of(one.load())}]
    return f"; an option of {', '.join(found)}" if found else ""


def run_pipeline(model: Path, pipeline: Pipeline, output: Path, **options: Any) -> None:
    """Run a pipeline on a file, write the result, and print what was done."""
    from kvsurgeon.workflow.run_and_save import run_and_save

    _run(run_and_save, model, pipeline, output, **options)


def _build_for(
    target: str, model: Path, output: Path, changed: dict[str, Any], *, certificate: Path | None, **options: Any
) -> None:
    from kvsurgeon.workflow.build_target import build_target
    from kvsurgeon.workflow.certificate import NO_CERTIFICATE

    if certificate is not None:
        raise UsageError(NO_CERTIFICATE)
    _run(build_target, model, target, output, options=changed, **options)


def _run(function: Callable[..., PipelineRun], *args: Any, json: bool, **options: Any) -> None:
    from kvsurgeon.reporting import json_output, table
    from kvsurgeon.reporting.progress import verification_progress

    with redirect_stdout(sys.stderr), verification_progress() as progress:  # passes may print
        run = function(*args, progress=progress, **options)
    table.print_result(table.run_summary(run), json_output.run_json(run), json=json)


def _option(option: Option) -> inspect.Parameter:
    """Return the command-line option of an option of a pass; its value is a text."""
    help_text = option.help if option.required or option.is_flag else f"{option.help} [default: {_default(option)}]"
    if option.is_flag:
        declared = typer.Option(f"--{option.name}/--no-{option.name}", help=help_text)
        return _parameter(option.field, Annotated[bool, declared], *([] if option.required else [option.default]))
    metavar = option.kind if "|" in option.kind else option.kind.upper()
    declared = typer.Option(f"--{option.name}", metavar=metavar, help=help_text.strip())
    if option.required:
        return _parameter(option.field, Annotated[str, declared])
    return _parameter(option.field, Annotated[str | None, declared], None)


def _default(option: Option) -> str:
    if isinstance(option.default, tuple):
        return ",".join(map(str, option.default)) or "none"
    return "none" if option.default is None else str(option.default)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _help(pass_class: type) -> str:
    """Return the docstring without the sections that describe the options."""
    return (inspect.getdoc(pass_class) or "").partition("\nAttributes:")[0].partition("\nArgs:")[0].strip()
