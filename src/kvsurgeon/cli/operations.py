"""Commands that change a model: one for each pass, made from its fields and its docstring, and `run`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsurgeon.errors import PluginError
from kvsurgeon.plugins import Plugin

if TYPE_CHECKING:
    from kvsurgeon.io.side_files import LinkMode
    from kvsurgeon.passes.options import Option
    from kvsurgeon.workflow.pipeline import Pipeline
    from kvsurgeon.workflow.surgery import Surgery

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file or a folder that holds one.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write: an .onnx file or a folder.")
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Let the judge decide before anything is written.")]
Copy = Annotated[
    bool, typer.Option("--copy-weights", help="Copy external data into another folder instead of linking it.")
]
Pack = Annotated[
    bool, typer.Option("--pack", help="Write all weights into one new data file, without those that are read no more.")
]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Text on which to measure what is lost; one ships."),
]
PerLayer = Annotated[bool, typer.Option("--per-layer", help="Measure what is lost of each attention layer too.")]
Json = Annotated[bool, typer.Option("--json", help="Answer for a program.")]
ForTarget = Annotated[
    str | None,
    typer.Option("--target", metavar="NAME", help="Write the folder that this runtime or compiler takes as it is."),
]
BRINGS_TO_TARGET = "inject"  # the pass that a target has its own options for


def stub() -> None:
    """Stand for a pass in a list of commands: it is not imported."""


def command_of(plugin: Plugin[type[Any]]) -> Callable[..., None]:
    """Return the command of a pass: its fields are the options, its docstring the help.

    Raises:
        PluginError: The pass cannot be imported, or an option of it has a name that all commands use.
    """
    from kvsurgeon.passes.options import build, options_of
    from kvsurgeon.workflow.pipeline import Pipeline

    pass_class = plugin.load()
    options = options_of(pass_class)
    defaults = {option.field: option.default for option in options}

    def command(
        model: Path,
        output: Path,
        verify: bool,
        copy_weights: bool,
        pack: bool,
        json: bool,
        target: str | None = None,
        text: Path | None = None,
        per_layer: bool = False,
        **given: Any,
    ) -> None:
        texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
        texts = {name: text for name, text in texts.items() if text is not None}
        wanted = build(pass_class, plugin.name, texts)
        writing: dict[str, Any] = {"verify": verify, "copy_weights": copy_weights, "pack": pack, "json": json}
        if target is not None:
            changed = {name: getattr(wanted, name) for name in texts if getattr(wanted, name) != defaults.get(name)}
            deliver(model, target, output, options=changed, **writing)
            return
        operate(model, Pipeline((wanted,)), output, text=text, per_layer=per_layer, **writing)

    fixed = (_parameter("model", Model), _parameter("output", Output))
    switches = tuple(
        _parameter(name, annotation, default)
        for name, annotation, default in (
            ("verify", Verify, True),
            ("copy_weights", Copy, False),
            ("pack", Pack, False),
            ("json", Json, False),
            *(() if getattr(pass_class, "exact", True) else (("text", Text, None), ("per_layer", PerLayer, False))),
            *([("target", ForTarget, None)] if plugin.built_in and plugin.name == BRINGS_TO_TARGET else ()),
        )
    )
    taken = {one.name for one in (*fixed, *switches)} & {option.field for option in options}
    if taken:
        raise PluginError(
            f"pass {plugin.name} of {plugin.package}: its option {min(taken)} is one that every command has"
        )
    parameters = [*fixed, *map(_option, options), *switches]
    command.__doc__ = _help(pass_class)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def operate(
    model: Path,
    pipeline: Pipeline,
    output: Path,
    *,
    verify: bool,
    verify_each: bool = False,
    copy_weights: bool = False,
    pack: bool = False,
    text: Path | None = None,
    per_layer: bool = False,
    trace: Path | None = None,
    json: bool = False,
) -> None:
    """Run `pipeline` on a file, write what it makes, and say what was done."""
    from kvsurgeon.report import progress
    from kvsurgeon.report.trace import tracing
    from kvsurgeon.workflow.surgery import operate as operate_on

    with redirect_stdout(sys.stderr), progress.judging() as told:  # what a pass prints is no part of the answer
        surgery = operate_on(
            model,
            pipeline,
            output,
            verify=verify,
            verify_each=verify_each,
            link_mode="copy" if copy_weights else "link",
            pack=pack,
            text=text,
            per_layer=per_layer,
            watch=None if trace is None else tracing(trace),
            progress=told,
        )
    _tell(surgery, json=json)


def deliver(
    model: Path,
    target: str,
    output: Path,
    *,
    options: dict[str, Any],
    verify: bool,
    copy_weights: bool = False,
    pack: bool = False,
    json: bool = False,
) -> None:
    """Write the folder that a target takes, and say what was done."""
    from kvsurgeon.report import progress
    from kvsurgeon.workflow.delivery import deliver as deliver_to

    link_mode: LinkMode = "copy" if copy_weights else "link"
    with redirect_stdout(sys.stderr), progress.judging() as told:
        delivery = deliver_to(
            model, target, output, options=options, verify=verify, link_mode=link_mode, pack=pack, progress=told
        )
    _tell(delivery, json=json)


def judged(original: Path, result: Path, *, seed: int, json: bool) -> int:
    """Let the judge compare two models, say what it found, and return the exit code."""
    from kvsurgeon.report import answer, progress, table
    from kvsurgeon.workflow.verification import judge

    with progress.judging() as told:
        sameness = judge(original, result, seed=seed, progress=told)
    if json:
        answer.show(answer.sameness(sameness))
    else:
        table.console().print(table.sameness(sameness))
    return {"same": 0, "different": 1, "unknown": 3}[sameness.verdict]


def lost(original: Path, result: Path, *, text: Path | None, per_layer: bool, json: bool) -> None:
    """Measure what one model lost of another, and say it."""
    from kvsurgeon.report import answer, progress, table
    from kvsurgeon.workflow.loss import measure

    with progress.judging() as told:
        loss = measure(original, result, text=text, per_layer=per_layer, progress=told)
    if json:
        answer.show(loss.as_dict())
    else:
        table.console().print(table.loss(loss))


def _tell(surgery: Surgery, *, json: bool) -> None:
    from kvsurgeon.report import answer, table

    if json:
        answer.show(answer.surgery(surgery))
    else:
        table.console().print(table.surgery(surgery))


def _option(option: Option) -> inspect.Parameter:
    """Return an option of a command that holds the text of an option of a pass."""
    help_text = option.help if option.required or option.is_flag else f"{option.help} [default: {_default(option)}]"
    if option.is_flag:
        declared = typer.Option(f"--{option.dim_names}/--no-{option.dim_names}", help=help_text)
        return _parameter(option.field, Annotated[bool, declared], *([] if option.required else [option.default]))
    declared = typer.Option(f"--{option.dim_names}", metavar=_placeholder(option.kind), help=help_text.strip())
    if option.required:
        return _parameter(option.field, Annotated[str, declared])
    return _parameter(option.field, Annotated[str | None, declared], None)


def _placeholder(kind: str) -> str:
    """Return what a help page says in place of a value: a word such as TEXT, or the choices as they are written."""
    return kind if "|" in kind else kind.upper()


def _default(option: Option) -> str:
    if isinstance(option.default, tuple):
        return ",".join(map(str, option.default)) or "none"
    return "none" if option.default is None else str(option.default)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _help(pass_class: type) -> str:
    """Return the docstring up to its sections: the options are listed by themselves."""
    return (inspect.getdoc(pass_class) or "").partition("\nAttributes:")[0].partition("\nArgs:")[0].strip()
