"""The judge of passes that leave the cache as it is: what it must notice, and what it must not mind."""

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
from kvsurgeon.workflow.verification import judge

SMALL = Config(layers=1, windowed=())
STATIC = Config(layers=1, windowed=(), static=(1, 6))


class _DeafToPadding:
    """It takes the mask, and lets every token count."""

    def padding(self) -> str:
        return self.graph.op("Add", "attention_mask", self.graph.constant(1))


class DeafDecoder(_DeafToPadding, Decoder):
    pass


class DeafCachedDecoder(_DeafToPadding, CachedDecoder):
    pass


class BlindDecoder(Decoder):
    """A masked query that is left no key gives no numbers; nobody reads them."""

    def number(self, value: float) -> str:
        return super().number(-np.inf if value < -100 else value)


@pytest.mark.parametrize("config", [SMALL, STATIC], ids=["any length", "fixed length"])
def test_padding_that_no_longer_counts(config):
    assert judge(Decoder(config).model(), DeafDecoder(config).model()).verdict == "different"


def test_padding_that_no_longer_counts_beside_a_cache():
    assert judge(CachedDecoder(SMALL).model(), DeafCachedDecoder(SMALL).model()).verdict == "different"


@pytest.mark.parametrize("config", [SMALL, STATIC], ids=["any length", "fixed length"])
@pytest.mark.parametrize("decoder", [Decoder, BlindDecoder])
def test_what_is_the_same(decoder, config):
    assert judge(decoder(config).model(), decoder(config).model()).verdict == "same"


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_the_same_at_the_only_length_that_is_left(tokens):
    done = run_and_save(Decoder(SMALL).model(), Pipeline.parse(f"fix-shapes{{tokens={tokens}}}"))
    assert done.verification.verdict == "same"


def test_positions_that_a_model_counted_are_told_it_as_it_counted_them():
    """Rows of a table are read by position: padding moves them where the model is told otherwise than it counted."""

    class Absolute(Decoder):
        def norm(self, hidden: str) -> str:
            if not hasattr(self, "placed"):
                self.placed = True
                table = self.graph.constant(np.random.default_rng(3).normal(size=(32, SMALL.hidden)), "float32")
                place = self.range(0, self.size("input_ids", 1))
                hidden = self.graph.op("Add", hidden, self.graph.op("Gather", table, place))
            return super().norm(hidden)

    done = run_and_save(Absolute(SMALL).model(), Pipeline.parse("add-position-ids"))
    assert done.verification.verdict == "same"


def test_what_is_the_same_with_a_cache():
    assert judge(CachedDecoder(SMALL).model(), CachedDecoder(SMALL).model()).verdict == "same"


def test_a_cache_and_a_mask_of_which_neither_names_nor_dims_tell():
    model = CachedDecoder(SMALL).model()
    names = {"past_key_values.0.": "memory_in_", "present.0.": "memory_out_", "_sequence_length": ""}
    text = onnx.printer.to_text(model)
    for old, new in names.items():
        text = text.replace(old, new)
    model = onnx.parser.parse_model(text)
    assert run_and_save(model, Pipeline((Retarget(),))).verification.verdict == "same"


def test_tables_that_a_host_makes_are_not_made_up():
    original = export("llama_torchscript_sdpa")
    row = Pipeline((Inject(cache="new-tokens"), HostInputs(max_length=64)))
    result = io.to_proto(row.run(original).model)
    sameness = judge(original, result)
    assert (sameness.verdict, "position_ids_cos" in sameness.problems[0]) == ("unknown", True)


def test_masks_and_places_that_a_host_makes_are_known():
    original = read(attention())
    row = Pipeline((Inject(cache="new-tokens"), HostInputs(max_length=64)))
    assert judge(original, io.to_proto(row.run(original).model)).verdict == "same"


def test_a_cache_that_has_the_names_and_lengths_of_somebody_else():
    after = injected(Decoder(SMALL).model(), past="{kind}_cache_{layer}", present="{kind}_out_{layer}")
    before = onnx.ModelProto.FromString(after.SerializeToString())
    theirs = {"past_sequence_length": "past", "total_sequence_length": "total", "sequence_length": "sequence"}
    for value in (*before.graph.input, *before.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = theirs.get(dim.dim_param, dim.dim_param)

    assert judge(before, after).verdict == "same"
