"""Rename inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.graph.editor import Editor, check_free
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_metadata import rename_in_metadata


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
        renamed = rename(subject.model, new_names)
        if renamed:
            return Changed(edits=len(renamed), renamed=renamed)
        interface = (*subject.model.graph.inputs, *subject.model.graph.outputs)
        missing = [old for old in new_names if old not in {value.name for value in interface}]
        return Unchanged(
            reason=f"no input or output is named {' or '.join(missing)}" if missing else "old and new names are equal"
        )


def rename(model: ir.Model, new_names: Mapping[str, str]) -> dict[str, str]:
    """Rename inputs and outputs, in the metadata too, and return the new names by the old ones.

    Names that the model lacks are ignored.

    Raises:
        UnsupportedError: Another input or output has the new name.
    """
    interface = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    renamed = {old: new for old, new in new_names.items() if old in interface and old != new}
    check_free(model.graph, renamed.values())
    editor = Editor(model)
    for old, new in renamed.items():
        editor.release_name(new)
        interface[old].name = new
    rename_in_metadata(model, renamed)
    return renamed


def _pair(text: str) -> tuple[str, str]:
    old, colon, new = text.rpartition(":")  # of `onnx::Cast_0:mask` too
    if not (old and colon and new):
        raise UsageError(f"expected names such as old:new, found {text!r}")
    return old, new
