"""Whatever mixes tokens or sequences outside attention is rejected, and what reads earlier tokens only is injected."""

import pytest
from exports import injected
from laws import assert_law
from mixing_models import keeps_apart, kinds, mixing_model

from kvsurgeon.errors import UnsupportedError


@pytest.mark.parametrize(
    ("kind", "place", "is_right"), [pytest.param(*case, id=f"{case[0]}, {case[1]}") for case in kinds()]
)
def test_only_what_keeps_tokens_and_sequences_apart_is_injected(kind, place, is_right):
    model = mixing_model(kind, place, seed=12)
    assert keeps_apart(model, seed=12) is is_right
    if is_right:
        assert_law(model, injected(model))
        return
    with pytest.raises(UnsupportedError):
        injected(model)
