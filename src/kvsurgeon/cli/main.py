"""The command line: arguments in, exit code and error message out."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from kvsurgeon.cli.commands import add_commands
from kvsurgeon.cli.help import CommandGroup
from kvsurgeon.cli.pass_commands import passes_with
from kvsurgeon.errors import Code, InternalError, KvsurgeonError, UsageError
from kvsurgeon.reporting.encoding import replace_unencodable

# Exit codes, apart from those of errors
NO_COMMAND = 2  # help is printed
CLOSED_PIPE = 1
INTERRUPTED = 130  # 128 + SIGINT

_STDOUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)

Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of errors. Allowed at any position.")]


def main() -> None:
    """Run the command of `sys.argv`, and exit."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    replace_unencodable()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _end_without_stdout(error)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command, and return its exit code."""
    debug, as_json = "--debug" in arguments, "--json" in arguments
    if "" in arguments:  # such as an unset shell variable, which as a path would be the working directory
        return _print_error(UsageError("expected a value for each argument, found an empty one"), as_json=as_json)
    remaining = [argument for argument in arguments if argument != "--debug"]
    logging.disable(logging.NOTSET if debug else logging.WARNING)
    try:
        return _invoke(remaining) if remaining or _words_to_complete() else _invoke(["--help"]) or NO_COMMAND
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BaseException as error:  # SystemExit of foreign code too, whose exit code could be 0
        if isinstance(error, SystemExit) and _is_completion(remaining):
            return 0
        for one in (error, error.__context__):  # typer makes a SystemExit of a closed pipe
            if isinstance(one, OSError) and one.filename is None and one.errno in _STDOUT_ERRORS:
                return _end_without_stdout(one)
        if debug:
            traceback.print_exc()
        return _print_error(error, as_json=as_json)


def _invoke(arguments: Sequence[str]) -> int:
    app = typer.Typer(
        cls=CommandGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_global_options)
    add_commands(app, arguments or _words_to_complete())
    command = typer.main.get_command(app)
    code = command.main(args=list(arguments), prog_name="kvsurgeon", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _is_completion(arguments: Sequence[str]) -> bool:
    """Whether the shell asks for words, or the user for its script; typer then exits."""
    return bool(_words_to_complete() or {"--install-completion", "--show-completion"} & set(arguments))


def _words_to_complete() -> list[str]:
    """Return the arguments that a shell wants to be completed, as its script gives them."""
    if "_KVSURGEON_COMPLETE" not in os.environ:
        return []
    return (os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS") or "kvsurgeon").split()[1:] or [""]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvsurgeon {version('kvsurgeon')}")
        raise typer.Exit


def _global_options(
    debug: Debug = False,
    shows_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Inject a KV cache into an exported ONNX decoder, and verify that its results stay the same.

    MODEL is an .onnx file or a folder that holds one.
    """


def _print_error(error: BaseException, *, as_json: bool) -> int:
    """Print an error in one line with its code, and return the exit code.

    Args:
        error: The error.
        as_json: Whether to print it as JSON too, on stdout.
    """
    if isinstance(error, KvsurgeonError):
        text, code, exit_code = str(error), error.code, error.exit_code
    elif hasattr(error, "format_message"):  # of typer; its base class differs between versions
        text, code, exit_code = error.format_message() or "expected a command", Code.USAGE, UsageError.exit_code
        text += passes_with(getattr(error, "option_name", ""))
    else:
        return _print_error(InternalError(error), as_json=as_json)
    text = " ".join(text.split())
    if as_json:
        print(json.dumps({"error": {"code": code, "exit_code": exit_code, "message": text}}, indent=2))
    kind = "internal error" if code is Code.INTERNAL else "error"
    print(f"kvsurgeon: {kind}: {text} [{code}]", file=sys.stderr)
    return exit_code


def _end_without_stdout(error: OSError) -> int:
    """Redirect stdout to nowhere, so that the interpreter can flush it at exit, and return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # the reader wants no more
        return CLOSED_PIPE
    return _print_error(UsageError(f"cannot write to stdout: {error.strerror}"), as_json=False)
