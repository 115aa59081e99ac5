"""One score product that feeds several value products: each keeps the value heads that it reads."""

from __future__ import annotations

import pytest
from laws import difference, in_onnxruntime, texts
from several_products import Form, decoder, forms

from kvsurgeon import io
from kvsurgeon.errors import ParityError
from kvsurgeon.heads import replace_heads
from kvsurgeon.heads.replace_heads import HeadReplacer
from kvsurgeon.passes.contract import CACHE_TOKENS, Changed, Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

DIFFERENTIAL = Form(products=2, blocks=True, split="Split", tile="Tile", kv_heads=2, groups=2)
FORMS = forms(24)


def error(form, *passes):
    model = decoder(form)
    changed = io.to_proto(Pipeline(passes).run(model).model)
    feeds = texts(model)
    before, after = (in_onnxruntime(one)(feeds)["logits"] for one in (model, changed))
    return difference(after, before, feeds["attention_mask"])


@pytest.mark.parametrize("form", [form for form in FORMS if form.groups > 1], ids=str)
def test_copies_of_heads_change_nothing(form):
    assert error(form, ReplicateKvHeads(repeat=2)) < 1e-6
    assert error(form, ExpandGqa()) < 1e-6


@pytest.mark.parametrize("form", [form for form in FORMS if form.groups > 1], ids=str)
def test_merging_copies_again_changes_nothing(form):
    assert error(form, ReplicateKvHeads(repeat=2), MergeKvHeads(kv_heads=form.kv_heads)) < 1e-6


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_merged_heads_are_those_of_averaged_weights(form):
    subject = Subject.of(decoder(form))
    outcome = MergeKvHeads(kv_heads=form.kv_heads // form.products).apply(subject)
    assert isinstance(outcome, Changed)
    assert outcome.equal_models is not None
    feeds = texts(decoder(form))
    expected, found = (in_onnxruntime(io.to_proto(one))(feeds)["logits"] for one in outcome.equal_models()[0])
    assert difference(found, expected, feeds["attention_mask"]) < 1e-5


def test_a_loss_does_not_hide_a_wrong_connection(monkeypatch):
    end = HeadReplacer._end

    def swapped(self, layer, repetition, kv_heads):
        heads, dims, shape = end(self, layer, repetition, kv_heads)
        return heads[::-1], dims, shape

    monkeypatch.setattr(HeadReplacer, "_end", swapped)
    form = Form(products=2, blocks=True, split="Split", tile="Tile", kv_heads=4, groups=2)
    with pytest.raises(ParityError, match="same weights"):
        run_and_save(decoder(form), Pipeline((MergeKvHeads(kv_heads=2),)))


def test_a_loss_does_not_hide_products_that_read_the_same_values(monkeypatch):
    monkeypatch.setattr(replace_heads, "_groups", lambda repetitions: [list(range(len(repetitions)))])
    monkeypatch.setattr(
        "kvsurgeon.heads.repetition._last_with_all_heads",
        lambda widths, width: max(place for place, one in enumerate(widths) if one == width),
    )
    with pytest.raises(ParityError, match="same weights"):
        run_and_save(decoder(DIFFERENTIAL), Pipeline((MergeKvHeads(kv_heads=1),)))


@pytest.mark.parametrize(
    ("bits", "notes"), [([64, 32], ()), ([64, 64], ("the cache is not smaller: 8 bytes per token, before 8",))]
)
def test_a_cache_that_is_not_smaller_is_reported(monkeypatch, bits, notes):
    sizes = iter(bits)
    monkeypatch.setattr(
        "kvsurgeon.passes.heads.change_heads.bytes_of_cache", lambda *_: next(sizes) // 8 * CACHE_TOKENS
    )
    outcome = MergeKvHeads(kv_heads=1).apply(Subject.of(decoder(DIFFERENTIAL)))
    assert isinstance(outcome, Changed)
    assert outcome.notes == notes
