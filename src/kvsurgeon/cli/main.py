"""The command line: which commands there are, and what a shell sees when one fails."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Protocol, runtime_checkable

import typer

from kvsurgeon.cli.commands import add_commands
from kvsurgeon.errors import KvsurgeonError, UsageError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
CLOSED_PIPE = 1  # as typer has it
UNSAID = 2  # no command was given: help is shown, and nothing is done

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from. May stand anywhere.")]


@runtime_checkable
class ParseError(Protocol):
    """What typer raises for a wrong command line; its base class differs between versions."""

    exit_code: int

    def format_message(self) -> str:
        """Return the message in one line."""
        ...


def main() -> None:
    """Run the command that the shell asks for."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        code = CLOSED_PIPE
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; unless `--debug` is given, nothing is traced."""
    debug = "--debug" in arguments
    if "" in arguments:  # as of a shell's variable that is not set: as a path it would be the folder that one is in
        return _complain(UsageError("expected something in each argument, found an empty one"))
    given = [argument for argument in arguments if argument != "--debug"]
    logging.disable(logging.NOTSET if debug else logging.WARNING)  # what libraries log is for those who look for it
    try:
        return _answer(given) if given else _answer(["--help"]) or UNSAID
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return CLOSED_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _complain(error)


def _answer(arguments: Sequence[str]) -> int:
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback()(_globals)
    add_commands(app, arguments)
    command = typer.main.get_command(app)
    code = command.main(args=list(arguments), prog_name="kvsurgeon", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kvsurgeon {version('kvsurgeon')}")
        raise typer.Exit


def _globals(
    debug: Debug = False,
    shows_version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Put a KV cache into an exported ONNX language model, and prove that it still computes the same.

    MODEL is an .onnx file or a folder that holds one.
    """


def _complain(error: Exception) -> int:
    """Say what is wrong in one line, and return the exit code that goes with it."""
    if isinstance(error, KvsurgeonError):
        text, code = str(error), error.exit_code
    elif isinstance(error, ParseError):
        text, code = error.format_message() or "expected a command; --help lists them", error.exit_code
    else:
        text, code = f"{type(error).__name__}: {error} (a bug of kvsurgeon's; --debug shows where)", 1
    print(f"kvsurgeon: {' '.join(text.split())}", file=sys.stderr)
    return code


def _forget_stdout() -> None:
    """Leave nothing for the interpreter to write when it ends: the reader is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
