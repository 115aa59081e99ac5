"""Verification of passes that do not add a cache."""

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import pytest
from attentions import attention
from decoders import CachedDecoder, Config, Decoder
from exports import export, injected
from written import read

from kvsurgeon import io
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.host_inputs.host_inputs import HostInputs
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save
from kvsurgeon.workflow.verification import verify_models

SMALL = Config(layers=1, windowed=())
STATIC = Config(layers=1, windowed=(), static=(1, 6))


class _IgnoresPadding:
    """A decoder that takes the mask and ignores it."""

    def padding(self) -> str:
        return self.graph.op("Add", "attention_mask", self.graph.constant(1))


class DecoderWithoutPadding(_IgnoresPadding, Decoder):
    pass


class CachedDecoderWithoutPadding(_IgnoresPadding, CachedDecoder):
    pass


class _TakesRightPadding:
    """A decoder that masks as many tokens at the end as the mask has zeros, as fused operators with lengths do."""

    def padding(self) -> str:
        op, constant = self.graph.op, self.graph.constant
        ones = op("Add", op("Mul", "attention_mask", constant(0)), constant(1))
        length = op("ReduceSum", "attention_mask", constant([1]))
        return op("Where", op("LessOrEqual", op("CumSum", ones, constant(1)), length), ones, constant(0))


class DecoderOfRightPadding(_TakesRightPadding, Decoder):
    pass


class CachedDecoderOfRightPadding(_TakesRightPadding, CachedDecoder):
    pass


class NanAtPadding(Decoder):
    """A decoder whose outputs are NaN at queries without visible keys."""

    def number(self, value: float) -> str:
        return super().number(-np.inf if value < -100 else value)


@pytest.mark.parametrize("config", [SMALL, STATIC], ids=["any length", "fixed length"])
def test_finds_ignored_padding(config):
    assert verify_models(Decoder(config).model(), DecoderWithoutPadding(config).model()).verdict == "different"


@pytest.mark.parametrize("seed", range(12))
def test_padding_that_the_reference_does_not_take_is_not_compared_whatever_the_texts(seed):
    models = DecoderOfRightPadding(SMALL).model(), CachedDecoderOfRightPadding(SMALL).model()
    report = verify_models(*models, seed=seed)
    unknown = {one.scenario for one in report.comparisons if one.verdict == "unknown"}
    padded = {"left padding", "first call of padding", "batch with padding", "holes in the mask"}
    assert (report.verdict, unknown) == ("same", padded)


def test_finds_ignored_padding_with_a_cache():
    assert (
        verify_models(CachedDecoder(SMALL).model(), CachedDecoderWithoutPadding(SMALL).model()).verdict == "different"
    )


@pytest.mark.parametrize("config", [SMALL, STATIC], ids=["any length", "fixed length"])
@pytest.mark.parametrize("decoder", [Decoder, NanAtPadding])
def test_accepts_equal_models(decoder, config):
    assert verify_models(decoder(config).model(), decoder(config).model()).verdict == "same"


@pytest.mark.parametrize("tokens", [1, 5])
def test_accepts_a_model_of_fixed_length(tokens):
    done = run_and_save(Decoder(SMALL).model(), Pipeline.parse(f"fix-shapes{{tokens={tokens}}}"))
    assert done.verification.verdict == "same"


def test_positions_count_padding_if_the_reference_computes_them():
    """The reference reads rows of a table by array index, padding included."""

    class Absolute(Decoder):
        def norm(self, hidden: str) -> str:
            if not hasattr(self, "position_added"):
                self.position_added = True
                table = self.graph.constant(np.random.default_rng(3).normal(size=(32, SMALL.hidden)), "float32")
                place = self.range(0, self.size("input_ids", 1))
                hidden = self.graph.op("Add", hidden, self.graph.op("Gather", table, place))
            return super().norm(hidden)

    done = run_and_save(Absolute(SMALL).model(), Pipeline.parse("add-position-ids"))
    assert done.verification.verdict == "same"


def test_accepts_equal_models_with_a_cache():
    assert verify_models(CachedDecoder(SMALL).model(), CachedDecoder(SMALL).model()).verdict == "same"


def test_finds_a_cache_without_usual_names_and_dims():
    model = CachedDecoder(SMALL).model()
    names = {"past_key_values.0.": "state_in_", "present.0.": "state_out_", "_sequence_length": ""}
    text = onnx.printer.to_text(model)
    for old, new in names.items():
        text = text.replace(old, new)
    model = onnx.parser.parse_model(text)
    assert run_and_save(model, Pipeline((Retarget(),))).verification.verdict == "same"


def test_verdict_is_unknown_if_the_application_computes_tables():
    original = export("llama_torchscript_sdpa")
    row = Pipeline((Inject(cache="new-tokens"), HostInputs(max_length=64)))
    result = io.to_proto(row.run(original).model)
    report = verify_models(original, result)
    assert (report.verdict, "position_ids_cos" in report.problems[0]) == ("unknown", True)


def test_knows_masks_and_position_numbers_of_the_application():
    original = read(attention())
    row = Pipeline((Inject(cache="new-tokens"), HostInputs(max_length=64)))
    assert verify_models(original, io.to_proto(row.run(original).model)).verdict == "same"


def test_accepts_a_cache_with_other_dim_names():
    after = injected(Decoder(SMALL).model(), past="{kind}_cache_{layer}", present="{kind}_out_{layer}")
    before = onnx.ModelProto.FromString(after.SerializeToString())
    others = {"past_sequence_length": "past", "total_sequence_length": "total", "sequence_length": "sequence"}
    for value in (*before.graph.input, *before.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = others.get(dim.dim_param, dim.dim_param)

    assert verify_models(before, after).verdict == "same"


def test_texts_pass_the_thresholds_that_the_proof_names():
    model = Decoder(Config(layers=2, window=200, max_length=400)).model()
    run = run_and_save(model, Pipeline((Inject(),)))
    assert 200 in run.thresholds
    scenarios = [one.scenario for one in run.verification.comparisons]
    assert "past 200 tokens" in scenarios
    assert "past 386 tokens" in scenarios  # a text as long as the table
    plain = [one.scenario for one in verify_models(model, model, thresholds=run.thresholds, effort="quick").comparisons]
    assert not [name for name in plain if name.startswith("past")]
