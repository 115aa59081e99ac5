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

from typing import ClassVar


class KvsurgeonError(Exception):
    """The root: catch it and every deliberate error of kvsurgeon is caught."""

    exit_code: ClassVar[int] = 1


class UsageError(KvsurgeonError):
    """An option, a name or a value cannot be used as given."""

    exit_code = 2


class PluginError(UsageError):
    """A pass of an installed package cannot be loaded, or takes a name that is taken."""


class InputError(KvsurgeonError):
    """The model cannot be read: nothing was looked at beyond the file itself."""

    exit_code = 4


class InvalidModelError(InputError):  # says what the file is
    """The file is not ONNX, is cut short, or its graph is not valid ONNX."""


class WeightsError(InputError):
    """External data is missing, too short, or lies outside the model's folder."""


class PassError(KvsurgeonError):
    """A pass raised an exception of its own, or left a graph that is not valid."""

    exit_code = 3


class ParityError(KvsurgeonError):
    """The result was run and does not compute what the original computes."""

    exit_code = 1


class RunError(KvsurgeonError):
    """A model that can be read cannot be run: an operator fails on what it is given."""


class MissingKernelError(RunError):
    """A valid model cannot be run here: onnxruntime has no kernel for one of its operators."""

    exit_code = 3


class BrokenCacheError(RunError):
    """A present does not hold the past and the new tokens, so it cannot be the past of the next call.

    Attributes:
        layer: The layer whose cache it belongs to.
    """

    def __init__(self, message: str, *, layer: int) -> None:
        self.layer = layer
        super().__init__(message)


class UnsupportedError(KvsurgeonError):  # says what was done
    """The graph cannot be handled soundly, and nothing was changed.

    Attributes:
        reason: What stands in the way, in the domain's words.
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
        at: str | None = None,
        layer: int | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.reason = reason
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
