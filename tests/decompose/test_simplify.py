"""An `If` on a size that the graph tells becomes the branch that runs, as for a squeeze of unknown axes."""

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected, operators
from written import read

from kvsurgeon.errors import UnsupportedError

CONSTANTS = "int64[4] heads = {0, 0, 1, 8}, int64[1] single = {1}, int64 two = {2}, int64[1] none = {0}"
SQUEEZE = """sizes_{0} = Shape({0}0_heads)
 size_{0} = Gather(sizes_{0}, {axis})
 is_one_{0} = Equal(size_{0}, {size})
 {0} = If (is_one_{0}) <
    then_branch = one_{0} () => (float[b, n, 8] inside) {{ at_{0} = Constant <value_ints = [2]> ()
      inside = Squeeze({0}0_heads, at_{0}) }},
    else_branch = more_{0} () => (float[b, n, m, 8] outside) {{ outside = Identity({0}0_heads) }}
 >"""


def squeezed(name: str, axis: str = "two", size: str = "one") -> str:
    return f"{name}0_heads = Reshape({name}0, heads)\n " + SQUEEZE.format(name, axis=axis, size=size)


def test_the_branch_that_runs_replaces_an_if():
    text = attention(key=squeezed("k"), value=squeezed("v"), constants=CONSTANTS)
    assert_law_of(text)
    assert "If" not in operators(injected(read(text)))


def test_the_other_branch_replaces_it_too():
    rest = "k_flat = Reshape(k1, flat)\n k = Identity(k_flat)"
    key = squeezed("k", size="two").replace(" k = If", " k1 = If") + "\n " + rest
    assert_law_of(attention(key=key, constants=f"{CONSTANTS}, int64[3] flat = {{0, 0, 8}}"))


def test_an_if_on_the_size_of_a_batch_stays():
    key = squeezed("k", axis="nought").replace("Identity(k0_heads)", "Squeeze(k0_heads, single)")
    with pytest.raises(UnsupportedError, match="control flow"):
        injected(read(attention(key=key, constants=CONSTANTS)))


def test_an_if_that_a_table_decides_up_to_its_last_row_stays():
    table = "rows = Slice(table, first, sizes_n, first)\n sizes_n = Gather(sizes, second)\n"
    key = table + squeezed("k", axis="nought", size="length").replace("Shape(k0_heads)", "Shape(rows)")
    with pytest.raises(UnsupportedError, match="control flow"):
        injected(in_order(read(attention(key=key, constants=f"{CONSTANTS}, float[64, 8] table"))))
