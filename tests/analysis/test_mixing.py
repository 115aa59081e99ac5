"""Whatever mixes tokens or sequences outside attention is rejected, and what reads earlier tokens only is injected."""

import pytest
from exports import injected
from laws import assert_law
from mixing_models import KINDS, PLACES, keeps_apart, mixing_model

from kvsurgeon.errors import UnsupportedError

CASES = [(kind, place) for kind in KINDS for place in PLACES]


@pytest.mark.parametrize(("kind", "place"), CASES, ids=lambda part: part.replace(" ", "-"))
def test_only_what_keeps_tokens_and_sequences_apart_is_injected(kind, place):
    model = mixing_model(kind, place, seed=12)
    assert keeps_apart(model, seed=12) is KINDS[kind]
    if KINDS[kind]:
        assert_law(model, injected(model))
        return
    with pytest.raises(UnsupportedError):
        injected(model)
