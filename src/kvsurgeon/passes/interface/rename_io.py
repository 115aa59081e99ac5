"""Rename inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.errors import Code, UnsupportedError, UsageError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class RenameIo:
    """Rename inputs and outputs.

    Before: `position_ids`. After `rename-io{names=position_ids:positions}`: `positions`. Names that the model does not
    have are ignored.

    Attributes:
        names: Pairs of old and new name, `old:new`.
    """

    name: ClassVar[str] = "rename-io"

    names: tuple[str, ...]

    def apply(self, subject: Subject) -> Outcome:
        """Rename the inputs and outputs of `subject.model`.

        Raises:
            UsageError: A pair is malformed, or two pairs have the same old or new name.
            UnsupportedError: Another input or output has the new name.
        """
        pairs = [_pair(text) for text in self.names]
        new_names = dict(pairs)
        if len(new_names) < len(pairs) or len(set(new_names.values())) < len(pairs):
            raise UsageError(f"expected each name once, found {','.join(self.names)}")
        graph = subject.model.graph
        interface = {value.name: value for value in (*graph.inputs, *graph.outputs)}
        renamed = [(interface[old], new) for old, new in pairs if old in interface and old != new]
        for _, new in renamed:
            if new in interface:
                raise UnsupportedError(
                    "the model already has an input or output of that name", code=Code.NAME_CONFLICT, at=new
                )
        editor = Editor(subject.model)
        for value, new in renamed:
            editor.release_name(new)
            value.name = new
        if renamed:
            return Changed(edits=len(renamed))
        missing = [old for old in new_names if old not in interface]
        return Unchanged(
            reason=f"no input or output is named {' or '.join(missing)}" if missing else "old and new names are equal"
        )


def _pair(text: str) -> tuple[str, str]:
    old, colon, new = text.partition(":")
    if not (old and colon and new):
        raise UsageError(f"expected names such as old:new, found {text!r}")
    return old, new
