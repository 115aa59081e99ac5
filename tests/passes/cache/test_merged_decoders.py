"""Of a merged decoder the branch that uses the cache is taken."""

from __future__ import annotations

import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from exports import injected
from laws import assert_law
from onnx import TensorProto, helper
from written import read

from kvsurgeon import io
from kvsurgeon.errors import ParityError, UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

CONFIG = Config(layers=2)


class FirstCall(CachedDecoder):
    """The branch of a first call: it returns its keys and values, and reads no cache."""

    prefix = "first/"

    def past_length(self) -> str:
        return self.graph.constant(0)

    def append(self, layer: int, past: str, new: str) -> str:
        return new


def merged(*, negated: bool = False, first: type[CachedDecoder] = FirstCall) -> onnx.ModelProto:
    """Return a decoder as optimum merges it: `If(use_cache_branch)` around a decoder with and one without a past."""
    decoders = [CachedDecoder(CONFIG).model(), first(CONFIG).model()]
    model = onnx.ModelProto()
    model.CopyFrom(decoders[0])
    del model.graph.node[:], model.graph.initializer[:]
    shared = {tensor.name: tensor for decoder in decoders for tensor in decoder.graph.initializer}
    model.graph.initializer.extend(shared.values())
    names = [output.name for output in model.graph.output]
    branches = []
    for decoder in decoders:
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        branches.append(helper.make_graph(decoder.graph.node, "branch", [], outputs))
    if negated:
        branches.reverse()
    model.graph.node.append(helper.make_node("Identity", ["use_cache_branch"], ["condition"]))
    model.graph.node.append(
        helper.make_node("If", ["condition"], names, then_branch=branches[0], else_branch=branches[1])
    )
    have = {value.name for value in model.graph.input}
    model.graph.input.extend(value for value in decoders[1].graph.input if value.name not in have)
    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("negated", [False, True])
def test_the_cache_branch_is_taken(negated):
    subject = Subject.of(merged(negated=negated))
    assert isinstance(RemoveCache().apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result)
    assert [value.name for value in result.graph.input] == ["input_ids", "attention_mask"]
    assert_law(Decoder(CONFIG).model(), injected(result))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_merged_decoder_becomes_any_other(cache):
    done = run_and_save(merged(), Pipeline((Retarget(cache=cache),)), effort="quick", seed=0)
    assert done.verification.verdict == "same"
    assert "use_cache_branch" not in {value.name for value in done.model.graph.inputs}


class Scaled(FirstCall):
    """A branch of the first call that computes something else."""

    def append(self, layer: int, past: str, new: str) -> str:
        return self.graph.op("Mul", new, self.graph.constant(1.5, "float32"))


def test_a_branch_of_the_first_call_that_differs_is_found():
    with pytest.raises(ParityError, match="differ"):
        run_and_save(merged(first=Scaled), Pipeline((Retarget(),)), effort="quick", seed=0)


def test_inject_names_the_cache_of_a_merged_decoder():
    with pytest.raises(UnsupportedError, match=r"already has a cache.* - at `past_key_values.0.key`"):
        Inject().apply(Subject.of(merged()))


def test_a_branch_without_a_cache_is_kept():
    model = read("""case (float[b, n, 8] x, float[b, 3, 8] image, bool has_image) => (float[b, n, 8] logits)
<float[8, 8] w, int64[1] second = {1}> {
  h = MatMul(x, w)
  logits = If (has_image) <
    then_branch = one () => (float[b, n, 8] a) { m = ReduceMean(image, second)  a = Add(h, m) },
    else_branch = other () => (float[b, n, 8] a) { a = Identity(h) }
  >
}""")
    assert not isinstance(RemoveCache().apply(Subject.of(model)), Changed)
    with pytest.raises(UnsupportedError, match="through control flow - at `logits`"):
        Inject().apply(Subject.of(model))


class Mixed(FirstCall):
    """A branch that reads some cache inputs, which the other one does not."""

    def update_cache(self, layer: int, key: str, value: str) -> tuple[str, str]:
        self.graph.op("Identity", "other")
        return super().update_cache(layer, key, value)

    def declare(self) -> None:
        super().declare()
        self.graph.input("other", self.config.onnx_type, ("batch_size", 2, "past_sequence_length", 8))


def test_branches_that_both_use_a_cache_are_refused():
    with pytest.raises(UnsupportedError, match="which of them uses the cache is unknown"):
        RemoveCache().apply(Subject.of(merged(first=Mixed)))
