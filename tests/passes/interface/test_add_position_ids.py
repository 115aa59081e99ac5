"""With positions as an input the model computes the same, and supports left padding."""

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder
from exports import ONE_OF_EACH, export

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.interface.add_position_ids import AddPositionIds
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.runtime import UncachedDecoder, open_session
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.verification import verify_models

PADDING = 3
COUNTING = [name for name in ONE_OF_EACH if not name.startswith("bloom")]  # biases of bloom depend on distances only


def with_positions(model, **options):
    subject = Subject.of(model)
    assert isinstance(AddPositionIds(**options).apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result)
    return result


def logits(model, ids, mask):
    decoder = UncachedDecoder(open_session(model, threads=1))
    return decoder.run(decoder.inputs.feeds(ids, mask))[decoder.logits]


class CutTable(Decoder):
    """Its table is cut to the length before rows are looked up."""

    def rotary(self, layer, function):
        return self.graph.op("Unsqueeze", self.rows(function), self.graph.constant([-3]))

    def rows(self, function):
        return self.graph.op("Gather", self.cut(function), self.rotary_index(0))

    def cut(self, function):
        width = self.config.head_dim
        angles = np.outer(np.arange(self.config.max_length), 1.0 / np.arange(1, width + 1))
        ends = [self.graph.constant([0]), self.row(self.new_length())]
        return self.graph.op("Slice", self.graph.constant(function(angles), self.config.dtype), *ends)


class CutByNarrowNumbers(CutTable):
    """A slice of all features of the rows, with int32 bounds."""

    def rows(self, function):
        bounds = [self.graph.constant([number], "int32") for number in (0, self.config.head_dim, -1, 1)]
        return self.graph.op("Slice", super().rows(function), *bounds)


class CutTableByElement(CutTable):
    """A lookup of each feature alone."""

    def rows(self, function):
        index = self.rotary_index(0)
        index = self.graph.op("Unsqueeze", index, self.graph.constant([-1]))
        batch = [self.size("input_ids", 0)] if self.config.position_ids else []
        sizes = [*batch, self.new_length(), self.graph.constant(self.config.head_dim)]
        sizes = self.graph.op("Concat", *(self.row(size) for size in sizes), axis=0)
        table = self.cut(function)
        if batch:
            table = self.graph.op("Expand", self.row(table), sizes)
        return self.graph.op("GatherElements", table, self.graph.op("Expand", index, sizes), axis=len(batch))


class ScaledByShape(CutTable):
    """Scores divided by a size of the values, which all layers before compute."""

    def heads(self, hidden, name, count, gain=1.0):
        self.value = super().heads(hidden, name, count, gain)
        return self.value

    def scale(self, layer):
        size = self.graph.op("CastLike", self.size(self.value, 3), self.number(0.0))
        return self.graph.op("Reciprocal", self.graph.op("Sqrt", size))


VARIANTS = [CutTable, CutByNarrowNumbers, CutTableByElement, ScaledByShape]


def check_that_padding_shifts_nothing(original, placed):
    ids = np.random.default_rng(1).integers(3, 40, (2, 9))
    expected = logits(original, ids, np.ones_like(ids))
    padded = np.pad(ids, ((0, 0), (PADDING, 0)))
    mask = np.pad(np.ones_like(ids), ((0, 0), (PADDING, 0)))
    found = logits(placed, padded, mask)[:, PADDING:]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize("name", COUNTING)
def test_left_padding_changes_nothing(name):
    check_that_padding_shifts_nothing(export(name), with_positions(export(name)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_sliced_table_are_those_of_the_positions(variant):
    model = variant().model()
    check_that_padding_shifts_nothing(model, with_positions(model))
    result = Pipeline((AddPositionIds(), Inject())).run(model)
    assert verify(model, io.to_proto(result.model)).verdict == "same"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_can_be_injected_after_a_lookup_in_a_sliced_table(variant):
    model = variant(Config(position_ids=True)).model()
    assert verify(model, io.to_proto(Pipeline((Inject(),)).run(model).model)).verdict == "same"


@pytest.mark.parametrize("name", ["gpt2_torchscript_sdpa", "llama_dynamo_sdpa"])
def test_positions_are_read_from_the_input(name):
    ids = np.random.default_rng(1).integers(3, 40, (2, 9))
    decoder = UncachedDecoder(open_session(with_positions(export(name)), threads=1))
    feeds = decoder.inputs.feeds(ids, np.ones_like(ids))
    usual = decoder.run(feeds)[decoder.logits]
    apart = decoder.run({**feeds, "position_ids": feeds["position_ids"] * np.array([[1], [2]])})[decoder.logits]
    np.testing.assert_array_equal(apart[0], usual[0])
    assert np.abs(apart[1] - usual[1]).max() > 0.01 * np.ptp(usual)


@pytest.mark.parametrize("name", ["gpt2_torchscript_sdpa", "llama_torchscript_sdpa", "gemma2_dynamo_eager"])
def test_a_cache_can_be_injected_afterwards(name):
    result = Pipeline((AddPositionIds(), Inject())).run(export(name))
    positions = next(value for value in result.model.graph.inputs if value.name == "position_ids")
    assert [dim.value for dim in positions.shape] == ["batch_size", "sequence_length"]
    assert verify(export(name), io.to_proto(result.model)).verdict == "same"


@pytest.mark.parametrize(
    "form", [{}, {"cache": "static"}, {"cache": "new-tokens", "past_length": "input", "past": "past_{kind}_{layer}"}]
)
def test_an_existing_cache_is_restored(form):
    original = export("llama_torchscript_sdpa")
    cached = io.to_proto(Pipeline((Inject(**form),)).run(original).model)
    result = with_positions(cached)
    names = [value.name for value in cached.graph.input]
    names.insert(names.index("attention_mask") + 1, "position_ids")
    assert [value.name for value in result.graph.input] == names
    assert verify(original, result).verdict == "same"


def test_the_pass_alone_is_verified():
    assert verify_models(export("llama_dynamo_sdpa"), with_positions(export("llama_dynamo_sdpa"))).verdict == "same"
    broken = with_positions(export("gpt2_dynamo_sdpa"))
    next(node for node in broken.graph.node if "position_ids" in node.input).input[0] = "input_ids"
    assert verify_models(export("gpt2_dynamo_sdpa"), broken).verdict == "different"


def test_no_rows_are_computed_for_unused_positions():
    """No range over the length is left for positions, and nothing is computed whole and picked from."""
    model = with_positions(export("llama_dynamo_sdpa"))
    readers = {node.op_type for node in model.graph.node if "position_ids" in node.input}
    assert readers == {"Reshape", "Shape"}


def test_a_second_run_is_unchanged_unless_the_name_differs():
    model = with_positions(export("gpt2_dynamo_sdpa"), input="positions")
    assert model.graph.input[-1].name == "positions"
    assert isinstance(AddPositionIds(input="positions").apply(Subject.of(model)), Unchanged)
    assert isinstance(AddPositionIds().apply(Subject.of(model)), Unchanged)


def test_a_model_that_depends_on_distances_only_is_unchanged():
    subject = Subject.of(export("bloom_dynamo_eager"))
    before = subject.model
    assert "masks and biases by distance" in AddPositionIds().apply(subject).reason
    assert subject.model is before


def test_an_export_of_fixed_length_takes_shorter_calls_at_given_positions():
    original = Decoder(Config(static=(1, 16))).model()
    model = with_positions(original)
    ids, ones = np.arange(16)[None] % 7, np.ones((1, 16), np.int64)
    whole = logits(original, ids, ones)
    for length in (16, 5):
        np.testing.assert_allclose(logits(model, ids[:, :length], ones[:, :length]), whole[:, :length], atol=1e-5)
    assert verify(original, model).verdict == "same"


def test_a_fixed_batch_of_several_sequences_is_rejected():
    with pytest.raises(UnsupportedError, match=r"batch size is fixed.*found 2") as error:
        with_positions(Decoder(Config(static=(2, 16))).model())
    assert error.value.at == "position_ids"


def test_inputs_and_outputs_are_renamed():
    subject = Subject.of(Decoder(Config(position_ids=True)).model())
    outcome = RenameIo(names=("position_ids:positions", "logits:scores", "nothing:else")).apply(subject)
    assert outcome.edits == 2
    graph = io.to_proto(subject.model).graph
    assert {"positions", "scores"} <= {value.name for value in (*graph.input, *graph.output)}
    assert isinstance(RenameIo(names=("position_ids:positions",)).apply(subject), Unchanged)
    with pytest.raises(UnsupportedError, match="of that name - at `scores`"):
        RenameIo(names=("positions:scores",)).apply(subject)
    with pytest.raises(UsageError, match="old:new"):
        RenameIo(names=("positions",)).apply(subject)
