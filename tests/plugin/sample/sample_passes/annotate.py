from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class Annotate:
    """Add a note to the metadata of nodes.

    Attributes:
        note: The text.
        operators: The operators of these nodes.
    """

    name: ClassVar[str] = "annotate"

    note: str
    operators: tuple[str, ...] = ("MatMul",)

    def apply(self, subject: Subject) -> Outcome:
        nodes = [node for node in subject.model.graph if node.op_type in self.operators]
        if not nodes:
            return Unchanged(reason=f"no node is {' or '.join(self.operators)}")
        for node in nodes:
            node.metadata_props["note"] = self.note
        return Changed(edits=len(nodes))
