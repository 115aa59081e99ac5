"""OperatorCall inputs and outputs what a client calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class RenameIo:
    """OperatorCall inputs and outputs otherwise.

    Before: `position_ids`. After `rename-io{names=position_ids:positions}`: `positions`. What is not there is let be.

    Attributes:
        names: Pairs of an old and a new name, `old:new`.
    """

    name: ClassVar[str] = "rename-io"

    names: tuple[str, ...]

    def apply(self, subject: Subject) -> Outcome:
        """RenameIo what there is in `subject.model`.

        Raises:
            UsageError: A pair is none, or one name stands in two.
            UnsupportedError: Another input or output has the new name.
        """
        pairs = [_pair(text) for text in self.names]
        new_names = dict(pairs)
        if len(new_names) < len(pairs) or len(set(new_names.values())) < len(pairs):
            raise UsageError(f"expected each name once, found {','.join(self.names)}")
        graph = subject.model.graph
        interface = {value.name: value for value in (*graph.inputs, *graph.outputs)}
        there = [(interface[old], new) for old, new in new_names.items() if old in interface and old != new]
        for _, new in there:
            if new in interface:
                raise UnsupportedError("the model already has an input or output of that name", at=new)
        editor = Editor(subject.model)
        for value, new in there:
            editor.release_name(new)
            value.name = new
        if not there:
            missing = [old for old in new_names if old not in interface]
            return Unchanged(
                reason=f"it has no input or output called {' or '.join(missing)}" if missing else "all are called so"
            )
        return Changed(edits=len(there))


def _pair(text: str) -> tuple[str, str]:
    old, colon, new = text.partition(":")
    if not (old and colon and new):
        raise UsageError(f"expected names such as old:new, found {text!r}")
    return old, new
