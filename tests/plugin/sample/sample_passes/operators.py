"""An operator of a package: one entry."""

from kvsurgeon.ops import Operator
from kvsurgeon.ops.elementwise import unary
from kvsurgeon.ops.operator import kept


def operators() -> list[Operator]:
    """Return the entry of `my.company::Swish`, which works element by element."""
    return [Operator(domain="my.company", op_type="Swish", shape=unary, axes=kept)]
