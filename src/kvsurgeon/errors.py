"""All exceptions that kvsurgeon raises on purpose, with their codes and exit codes.

::

    KvsurgeonError
    ├── UsageError              2  an option, a name or a value cannot be used
    │   └── PluginError         2  a pass or target of an installed package cannot be loaded, or its name is in use
    ├── InputError              4  the model cannot be read
    │   ├── InvalidModelError   4  not ONNX, truncated, or an invalid graph
    │   ├── WeightsError        4  external data is missing, too short, or outside the model's folder
    │   └── InvalidCertificateError 4  the file is not a certificate
    ├── UnsupportedError        3  the graph cannot be handled soundly
    ├── PassError               3  a pass failed, or left an invalid graph
    ├── ParityError             1  the result does not compute what the original computes
    │   ├── CertificateError    1  a statement of a certificate does not hold
    │   └── LossError           1  the accuracy loss is above the bound
    ├── RunError                1  a valid model fails at run time
    │   ├── MissingKernelError  3  onnxruntime has no kernel for an operator
    │   └── BrokenCacheError    1  a present cannot be the past of the next call
    └── InternalError           5  a mistake of kvsurgeon

A message is one line: what happened; expected, found, at, hint. ``docs/errors.md`` describes each class and each code.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import ClassVar

_REPORT = "this is a mistake of kvsurgeon, please report it with the model and the traceback that --debug prints"


class Code(StrEnum):
    """Stable codes of errors; the first digit is the exit code. ``docs/errors.md`` gives cause and remedy of each."""

    DIFFERENT_RESULT = "KVS-101"
    RUN_FAILED = "KVS-102"
    BROKEN_CACHE = "KVS-103"
    NOT_CONFIRMED = "KVS-104"
    ACCURACY_LOSS = "KVS-105"
    USAGE = "KVS-201"
    PLUGIN = "KVS-202"
    UNSUPPORTED = "KVS-300"
    NO_ATTENTION = "KVS-301"
    NOT_CAUSAL = "KVS-302"
    LENGTH_DEPENDENT = "KVS-303"
    MIXES_TOKENS = "KVS-304"
    UNKNOWN_OPERATOR = "KVS-305"
    UNTRACEABLE_SEQUENCE = "KVS-306"
    HAS_CACHE = "KVS-307"
    INPUT_ROLE = "KVS-308"
    NO_CACHE_POINT = "KVS-309"
    PADDING_LEAK = "KVS-310"
    BATCH_LEAK = "KVS-311"
    CONTROL_FLOW = "KVS-312"
    FIXED_LENGTH = "KVS-313"
    SELECTS_BY_POSITION = "KVS-314"
    CONTEXT_NOT_RUNNABLE = "KVS-315"
    FUSED_OPERATOR = "KVS-316"
    UNKNOWN_CACHE = "KVS-317"
    UNTRACEABLE_HEADS = "KVS-318"
    CANNOT_AVERAGE = "KVS-319"
    NOT_FUSABLE = "KVS-320"
    TARGET = "KVS-321"
    LENGTH_LIMIT = "KVS-322"
    NAME_CONFLICT = "KVS-323"
    OPSET = "KVS-324"
    UNCHANGED = "KVS-325"
    NOT_VERIFIABLE = "KVS-326"
    INCONSISTENT_SHAPES = "KVS-327"
    TOKEN_DEPENDENT_MASK = "KVS-328"
    INVALID_RESULT = "KVS-329"
    MISSING_KERNEL = "KVS-330"
    PASS_PRECONDITION = "KVS-331"
    NOT_CONFIRMABLE = "KVS-332"
    NOT_TRAINABLE = "KVS-333"
    UNREADABLE = "KVS-401"
    INVALID_MODEL = "KVS-402"
    WEIGHTS = "KVS-403"
    INVALID_CERTIFICATE = "KVS-404"
    INTERNAL = "KVS-501"


def describe_exception(error: BaseException) -> str:
    r"""Return the type and the message of an exception of foreign code, in one line.

    >>> describe_exception(ZeroDivisionError("division\nby zero"))
    'ZeroDivisionError: division by zero'
    """
    try:
        message = " ".join(str(error).split())
    except Exception:  # a message that cannot be written
        message = ""
    return f"{type(error).__name__}: {message or 'no message'}"


def reraise_mistake(error: BaseException) -> None:
    """Raise an exception again if no model can cause it, so that it does not become a statement about the model.

    Raises:
        NameError: It is a name that the code does not define.
        ImportError: It is a module or a name that cannot be imported.
    """
    if isinstance(error, NameError | ImportError):
        raise error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question with the known names that are close to an unknown one; without any, all known names.

    >>> did_you_mean("injct", ("inject", "verify"))
    'did you mean inject?'
    >>> did_you_mean("x", ("inject", "verify"))
    'expected one of inject, verify'
    """
    names = tuple(known)
    close = get_close_matches(name, names)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"


class KvsurgeonError(Exception):
    """Base class of all deliberate errors.

    Attributes:
        exit_code: Exit code of the command line.
        code: Stable code of the error.
    """

    exit_code: ClassVar[int] = 1
    code: Code = Code.RUN_FAILED


class UsageError(KvsurgeonError):
    """An option, a name or a value cannot be used."""

    exit_code = 2
    code = Code.USAGE


class PluginError(UsageError):
    """A pass or target of an installed package cannot be loaded, or its name is in use."""

    code = Code.PLUGIN


class InputError(KvsurgeonError):
    """The model cannot be read."""

    exit_code = 4
    code = Code.UNREADABLE


class InvalidModelError(InputError):
    """The file is not ONNX, is truncated, or contains an invalid graph."""

    code = Code.INVALID_MODEL


class WeightsError(InputError):
    """External data is missing, too short, or outside the model's folder."""

    code = Code.WEIGHTS


class InvalidCertificateError(InputError):
    """The file is not a certificate of kvsurgeon."""

    code = Code.INVALID_CERTIFICATE


class PassError(KvsurgeonError):
    """A pass raised an unexpected exception, or left an invalid graph."""

    exit_code = 3
    code = Code.INVALID_RESULT


class ParityError(KvsurgeonError):
    """The result does not compute what the original computes."""

    exit_code = 1
    code = Code.DIFFERENT_RESULT


class CertificateError(ParityError):
    """A statement of a certificate does not hold."""

    code = Code.NOT_CONFIRMED


class LossError(ParityError):
    """The accuracy loss of the result is above the bound."""

    code = Code.ACCURACY_LOSS


class RunError(KvsurgeonError):
    """A valid model fails at run time."""

    code = Code.RUN_FAILED


class MissingKernelError(RunError):
    """onnxruntime has no kernel for an operator of a valid model."""

    exit_code = 3
    code = Code.MISSING_KERNEL


class BrokenCacheError(RunError):
    """A present does not consist of the past and the new rows, so it cannot be the past of the next call.

    Attributes:
        layer: Index of the cache entry's layer.
    """

    code = Code.BROKEN_CACHE

    def __init__(self, message: str, *, layer: int) -> None:
        self.layer = layer
        super().__init__(message)


class InternalError(KvsurgeonError):
    """A mistake of kvsurgeon; nothing was written, and the model may be a valid one.

    Attributes:
        cause: The exception.
        where: What raised it.
    """

    exit_code = 5
    code = Code.INTERNAL

    def __init__(self, cause: BaseException, *, where: str = "") -> None:
        self.cause = cause
        self.where = where
        super().__init__(f"{f'{where}: ' if where else ''}{describe_exception(cause)}; {_REPORT}")


class UnsupportedError(KvsurgeonError):
    """The graph cannot be handled soundly; the model is unchanged.

    Attributes:
        reason: What happened, in the terms of ``docs/glossary.md``.
        code: Stable code of the reason.
        at: Name of the value concerned; ONNX node names may be empty.
        layer: Index of the attention layer concerned, in execution order.
        expected: What is supported.
        found: What the graph contains.
        hint: What the user can do.
    """

    exit_code = 3

    def __init__(
        self,
        reason: str,
        *,
        code: Code = Code.UNSUPPORTED,
        at: str | None = None,
        layer: int | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.reason = reason
        self.code = code
        self.at = at
        self.layer = layer
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(reason)

    def __str__(self) -> str:
        text = self.reason if self.layer is None else f"layer {self.layer}: {self.reason}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.found is not None:
            text += f", found {self.found}"
        if self.at is not None:
            text += f" - at `{self.at}`"
        if self.hint is not None:
            text += f" ({self.hint})"
        return text
