"""Everything kvsurgeon raises on purpose, and the exit code that a shell sees.

::

    KvsurgeonError
    ├── UsageError              2  an option, a name or a value that cannot be used
    │   └── PluginError         2  a pass of somebody's own that cannot be loaded, or clashes in name
    ├── InputError              4  the model cannot be read
    │   ├── InvalidModelError      4  not ONNX, truncated, or not a valid graph
    │   └── WeightsError        4  external data missing, too short, or outside the model's folder
    ├── UnsupportedError                 3  the graph cannot be handled soundly
    ├── PassError               3  a pass raised, or left a graph that is not valid
    ├── ParityError             1  the result does not compute what the original computes
    └── RunError                1  a model that can be read cannot be run on what it is given
        ├── MissingKernelError  3  onnxruntime has no kernel for one of its operators
        └── BrokenCacheError    1  a present cannot be the past of the next call

A message says what was expected, what was found, where, and what to do now, in one line.
Each class has a paragraph in ``docs/errors.md``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Code(StrEnum):
    """Stable codes of errors: the first digit is the exit code. ``docs/errors.md`` lists cause and remedy of each."""

    DIFFERENT_RESULT = "KVS-101"
    RUN_FAILED = "KVS-102"
    BROKEN_CACHE = "KVS-103"
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
    HEAD_COUNT = "KVS-319"
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
    UNREADABLE = "KVS-401"
    INVALID_MODEL = "KVS-402"
    WEIGHTS = "KVS-403"


class KvsurgeonError(Exception):
    """The root: catch it and every deliberate error of kvsurgeon is caught."""

    exit_code: ClassVar[int] = 1
    code: Code = Code.RUN_FAILED


class UsageError(KvsurgeonError):
    """An option, a name or a value cannot be used as given."""

    exit_code = 2
    code = Code.USAGE


class PluginError(UsageError):
    """A pass of an installed package cannot be loaded, or takes a name that is taken."""

    code = Code.PLUGIN


class InputError(KvsurgeonError):
    """The model cannot be read: nothing was looked at beyond the file itself."""

    exit_code = 4
    code = Code.UNREADABLE


class InvalidModelError(InputError):  # says what the file is
    """The file is not ONNX, is cut short, or its graph is not valid ONNX."""

    code = Code.INVALID_MODEL


class WeightsError(InputError):
    """External data is missing, too short, or lies outside the model's folder."""

    code = Code.WEIGHTS


class PassError(KvsurgeonError):
    """A pass raised an exception of its own, or left a graph that is not valid."""

    exit_code = 3
    code = Code.INVALID_RESULT


class ParityError(KvsurgeonError):
    """The result was run and does not compute what the original computes."""

    exit_code = 1
    code = Code.DIFFERENT_RESULT


class RunError(KvsurgeonError):
    """A model that can be read cannot be run: an operator fails on what it is given."""

    code = Code.RUN_FAILED


class MissingKernelError(RunError):
    """A valid model cannot be run here: onnxruntime has no kernel for one of its operators."""

    exit_code = 3
    code = Code.MISSING_KERNEL


class BrokenCacheError(RunError):
    """A present does not hold the past and the new tokens, so it cannot be the past of the next call.

    Attributes:
        layer: The layer whose cache it belongs to.
    """

    code = Code.BROKEN_CACHE

    def __init__(self, message: str, *, layer: int) -> None:
        self.layer = layer
        super().__init__(message)


class UnsupportedError(KvsurgeonError):  # says what was done
    """The graph cannot be handled soundly, and nothing was changed.

    Attributes:
        reason: What stands in the way, in the domain's words.
        code: Its stable code.
        at: Name of the value (or input) at which it stands; ONNX node names may be empty.
        layer: Index of the attention layer, counted in execution order, where one is concerned.
        expected: What would have been accepted.
        found: What is there.
        hint: What the reader can do now.
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
