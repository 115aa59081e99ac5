from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class Annotate:
    """Give nodes of some operators a note in their metadata.

    Attributes:
        note: What it says.
        operators: Which operators get it.
    """

    name: ClassVar[str] = "annotate"

    note: str
    operators: tuple[str, ...] = ("MatMul",)

    def apply(self, subject: Subject) -> Outcome:
        nodes = [node for node in subject.model.graph if node.op_type in self.operators]
        if not nodes:
            return Unchanged(reason=f"there is no {' or '.join(self.operators)}")
        for node in nodes:
            node.metadata_props["note"] = self.note
        return Changed(edits=len(nodes))
