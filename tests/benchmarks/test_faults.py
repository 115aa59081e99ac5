"""A cache that is wrong in some calls only is noticed, whatever the calls, the place and the size."""

import pytest
from decoders import CachedDecoder, Config, Decoder
from verification.faults import PLACES, Fault, all_faults, with_fault

from kvsurgeon.parity import verify

CONFIG = Config(layers=2, max_length=1024)
CONDITIONS = sorted({fault.conditions for fault in all_faults()})


def report_on(fault):
    wrong = with_fault(CachedDecoder(CONFIG).model(), fault)
    return verify(Decoder(CONFIG).model(), wrong, threads=1, explain=False)


@pytest.mark.parametrize(
    "conditions", CONDITIONS, ids=lambda one: " and ".join(" ".join(map(str, part)) for part in one)
)
def test_every_kind_of_call_is_compared(conditions):
    report = report_on(Fault(conditions=conditions, place="logits", size=1e-2))

    assert report.verdict == "different"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_fault_is_noticed_at_every_place(place, size):
    report = report_on(Fault(conditions=(("past", ">", 0),), place=place, size=size))

    assert report.verdict == "different"


@pytest.mark.parametrize("place", ["past value", "past key"])
def test_a_cache_that_changes_by_a_millionth_in_each_call_is_noticed(place):
    fault = Fault(conditions=(("past", ">", 0),), place=place, size=1e-6)
    report = report_on(fault)

    assert report.verdict == "different"
    assert "does not start with the past of layer 0" in report.problems[0]


def test_a_right_cache_is_accepted():
    assert verify(Decoder(CONFIG).model(), CachedDecoder(CONFIG).model(), threads=1).verdict == "same"
