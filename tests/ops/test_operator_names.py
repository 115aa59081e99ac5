"""Operators are described in ops/; lists of their names elsewhere are few, and each has a reason."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from onnx import defs

from kvsurgeon.ops.operator import AxisLinks, Operator, Trait
from kvsurgeon.ops.table import BUILT_IN

SOURCE = Path(__file__).parents[2] / "src" / "kvsurgeon"
NAMES = {schema.name for schema in defs.get_all_schemas_with_history()} | {operator.op_type for operator in BUILT_IN}

# File and number of lists of two and more names: why the operator table does not say it.
LISTS = {
    ("anatomy/scales.py", 1): "between scores and mask, for people: what ends the search of a scale",
    ("decompose/sequences.py", 1): "what makes a sequence of tensors is what this file decomposes",
    ("fusion/bias.py", 1): "how each operator of a mask is read as a bias; no other stage reads masks so",
    ("fusion/score_path.py", 1): "what adds a mask to scores, in the form that attention operators take",
    ("graph/value_numbering.py", 1): "graph/ does not import the table; nothing else asks for random operators",
    ("heads/grouped_products.py", 1): "operators that are written as a plain product; others are copied",
    ("passes/interface/lm_head.py", 1): "what an LM head consists of, where positions are dropped",
    ("passes/operators/float16_mask_range.py", 2): "what masks scores by a constant, and where one starts",
    (
        "rewrite/by_sequence/given_positions.py",
        1,
    ): "what gathers rows of a table or replaces a range; other operators follow their links",
}
# The verifier shares no code with the analysis; a runtime's list of operators is a fact about the runtime, and torch's
# name of one about torch.
NOT_COUNTED = ("ops", "parity", "targets", "training")


def lists_of_names(path):
    """Yield the lists, sets and dicts in a file that have two and more names of operators."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        elements = node.elts if isinstance(node, ast.Set | ast.Tuple | ast.List) else getattr(node, "keys", [])
        names = [one.value for one in elements if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if len(NAMES.intersection(names)) > 1:
            yield names


def test_lists_of_operator_names_outside_the_table_have_a_reason():
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        if path.relative_to(SOURCE).parts[0] not in NOT_COUNTED and (count := len(list(lists_of_names(path)))):
            found[name] = count
    assert found == dict(tuple(LISTS))
    assert sum(found.values()) <= 10


@pytest.mark.parametrize("name", [*(one.name for one in fields(Operator)), *AxisLinks._fields])
def test_each_field_of_an_entry_is_read(name):
    sources = [path for path in SOURCE.rglob("*.py") if path.name != "operator.py"]
    assert any(re.search(rf"\.{name}\b(?!=)", path.read_text("utf-8")) for path in sources)


@pytest.mark.parametrize("trait", Trait)
def test_each_trait_is_asked_for_by_a_stage(trait):
    stages = [path for path in SOURCE.rglob("*.py") if path.parent.name != "ops"]
    assert any(re.search(rf"\bTrait\.{trait.name}\b", path.read_text("utf-8")) for path in stages)
