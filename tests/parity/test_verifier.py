"""The verifier accepts correct injections, and rejects wrong ones at the right place."""

import json
from functools import cache

import broken_decoders as broken
import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder

from kvsurgeon.errors import InputError
from kvsurgeon.parity import TextLengths, model_source
from kvsurgeon.parity import verify as verify_models
from kvsurgeon.runtime import open_session

CHUNKED = {"token by token", "prefill and steps", "ragged chunks", "batch", "left padding", "long past"}
EVERY = {"whole prefill", *CHUNKED}
SEVERAL_AT_ONCE = {"ragged chunks", "batch", "left padding", "long past"}  # calls of several tokens with a past


def verify(reference, candidate, **options):
    """Verify with the quick plan, whose scenarios the tests name."""
    return verify_models(reference, candidate, **({"effort": "quick", "seed": 0} | options))


@cache
def original(config: Config | None = None) -> onnx.ModelProto:
    return Decoder(config).model()


def scenarios_of(report, verdict=None):
    return {one.scenario for one in report.comparisons if verdict in (None, one.verdict)}


def verified(injected: onnx.ModelProto, **options):
    return verify(original(), injected, threads=1, **options)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(dtype="float16"),
        Config(position_ids=True),
        Config(attention_mask=False),
        Config(layers=1, windowed=(0,)),
        Config(kv_heads=4),
    ],
    ids=["float32", "float16", "position_ids", "without a mask", "one layer", "no groups"],
)
def test_accepts_a_correct_injection(config):
    report = verify(original(config), CachedDecoder(config).model(), threads=1)

    assert report.problems == ()
    assert report.verdict == "same"
    assert report.error < 1e-4
    assert scenarios_of(report) == (EVERY if config.attention_mask else EVERY - {"left padding"})


# mistake, scenarios that must fail, faulty layer, words of the report
WRONG = [
    (broken.WrongAxis, EVERY, 1, "layers.1."),
    (broken.NewFirst, CHUNKED, 1, "`present.1.key` does not start with the past of layer 1"),
    (broken.MissingOffset, CHUNKED, 0, "only the key of layer 0 is wrong from token 1 on"),
    (broken.MissingOffsetInOneLayer, CHUNKED, 1, "only the key of layer 1 is wrong from token 1 on"),
    (broken.StaleRotary, CHUNKED, 0, "only the key of layer 0 is wrong from token 1 on"),
    (broken.SwappedKeyValue, CHUNKED, 1, "but with `past_key_values.1.value`"),
    (broken.SwappedLayers, CHUNKED, 1, "but with `past_key_values.2.key`"),
    (broken.WrongCorner, CHUNKED, 1, "the fault is in attention of layer 1"),
    (broken.MaskDropped, SEVERAL_AT_ONCE, 1, "the fault is in attention of layer 1"),
    (broken.LayerWithoutCache, CHUNKED, 1, "the fault is in attention of layer 1, which has no cache"),
    (broken.WindowOffByOne, EVERY, None, "`layers.1.context`"),
    (broken.PaddingIgnored, {"left padding"}, None, "`layers.0.context`"),
    (broken.PastPaddingIgnored, {"left padding"}, 0, "the fault is in attention of layer 0"),
    (broken.PastTiled, CHUNKED, 1, "the fault is in attention of layer 1"),
    (broken.WithoutLastToken, EVERY, 1, "at `present.1.key`"),
    (broken.MissingScale, CHUNKED, 1, "the fault is in attention of layer 1"),
    (broken.RotatedTwice, CHUNKED, 1, "`present.1.key` does not start with the past of layer 1"),
    (broken.RowsMixed, {"batch", "left padding"}, 1, "`present.1.key` does not start with the past of layer 1"),
    (broken.LostDistantPast, {"long past"}, None, "`layers.2.context`"),
    (broken.WindowInAllLayers, EVERY, None, "already in a single prefill"),
    (broken.LastLayerUncausal, SEVERAL_AT_ONCE, 2, "the fault is in attention of the last layer, 2"),
    (broken.ShiftedInput, CHUNKED, 0, "key and value of the first layer, 0, are wrong from token 1 on"),
    (broken.NotANumber, CHUNKED, 1, "error of `logits` is inf"),
    (broken.OutputOrder, CHUNKED, 1, "`past_key_values.1.key` and `present.1.value` pair by order, but not by name"),
]


@pytest.mark.parametrize(("mistake", "scenarios", "layer", "words"), WRONG, ids=[row[0].__name__ for row in WRONG])
def test_rejects_a_wrong_injection_and_locates_the_fault(mistake, scenarios, layer, words):
    report = verified(mistake().model())

    assert not report.ok
    assert scenarios_of(report, "different") == scenarios
    assert report.layer == layer
    assert words in "\n".join(report.problems)


def test_all_mistakes_are_tested():
    mistakes = {
        value for value in vars(broken).values() if isinstance(value, type) and value.__module__ == broken.__name__
    }

    assert mistakes == {row[0] for row in WRONG}


def test_finds_a_mistake_in_float16():
    config = Config(dtype="float16")
    report = verify(original(config), broken.WrongCorner(config).model(), threads=1)

    assert report.arithmetic == "float16"
    assert (report.verdict, report.layer) == ("different", 1)


@pytest.mark.parametrize("static", [(1, 24), (2, 24)], ids=["batch 1", "batch 2"])
def test_runs_a_static_reference_at_its_only_length(static):
    config = Config(static=static)
    report = verify(original(config), CachedDecoder(config).model(), threads=1)

    assert report.verdict == "same"
    assert max(comparison.length for comparison in report.comparisons) == 24
    assert scenarios_of(report) == EVERY - {"long past"}
    assert not verify(original(config), broken.PastPaddingIgnored(config).model(), threads=1).ok


def test_runs_a_bounded_reference_up_to_its_longest_text():
    config = Config(max_length=40)
    report = verify(original(config), CachedDecoder(config).model(), threads=1)

    assert report.verdict == "same"
    assert max(comparison.length for comparison in report.comparisons) == 40
    assert report.notes == ("the longest text has 40 tokens: the reference model takes no more",)


def test_verifies_a_candidate_of_fixed_batch_at_that_batch():
    class BatchOfOne(CachedDecoder):
        def model(self):
            model = super().model()
            for value in [*model.graph.input, *model.graph.output]:
                value.type.tensor_type.shape.dim[0].dim_value = 1
            return model

    report = verified(BatchOfOne().model())

    assert report.verdict == "same"
    assert {one.batch for one in report.comparisons} == {1}
    assert "left padding" in scenarios_of(report)


def test_runs_a_reference_that_is_correct_for_one_row_with_one_row():
    class ScaleFollowsBatch(Decoder):
        def scale(self, layer):
            many = self.graph.op("Greater", self.size("input_ids", 0), self.graph.constant(1))
            return self.graph.op("Where", many, self.number(1.0), super().scale(layer))

    report = verify(ScaleFollowsBatch().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert {one.batch for one in report.comparisons} == {1}
    assert report.notes == ("the reference model is correct for batch size 1 only: batches were not compared",)


def test_compares_two_models_without_a_cache():
    report = verified(original())

    assert report.verdict == "same"
    assert {len(one.chunks) for one in report.comparisons} == {1}


def test_reports_a_missing_present():
    model = CachedDecoder().model()
    model.graph.output.pop()

    assert verified(model).problems == ("expected as many present outputs as past inputs, found 5 and 6",)


def test_reports_a_missing_output():
    class Two(Decoder):
        def model(self):
            model = super().model()
            model.graph.output.append(onnx.helper.make_tensor_value_info("layers.0.output", 1, ["b", "s", 32]))
            return model

    report = verify(Two().model(), CachedDecoder().model(), threads=1)

    assert report.problems == ("the candidate model lacks the output `layers.0.output`",)


def test_reports_a_candidate_that_cannot_be_opened():
    model = CachedDecoder().model()
    model.graph.node[0].input[0] = "nowhere"
    report = verified(model)

    assert report.verdict == "different"
    assert "onnxruntime does not accept the candidate model" in report.problems[0]


def test_verdict_is_unknown_if_the_reference_cannot_be_opened():
    unknown = Decoder().model()
    unknown.graph.node[-1].op_type = "OfNoRuntime"
    unknown.graph.node[-1].domain = "nobody"
    unknown.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    report = verify(unknown, CachedDecoder().model(), threads=1)

    assert (report.verdict, report.ok) == ("unknown", False)
    assert "OfNoRuntime" in report.problems[0]


def test_verdict_is_unknown_if_the_reference_fails_on_all_texts():
    class Failing(Decoder):
        def key_index(self):
            return self.range(0, self.graph.constant(7))  # fits no mask but that of 7 tokens

    report = verify(Failing().model(), CachedDecoder().model(), threads=1)

    assert (report.verdict, report.ok, report.comparisons) == ("unknown", False, ())


def test_notes_a_reference_that_depends_on_the_length():
    class SwitchesItsScale(Decoder):
        def scale(self, layer):
            long = self.graph.op("Greater", self.new_length(), self.graph.constant(60))
            return self.graph.op("Where", long, self.number(1.0), super().scale(layer))

    report = verify(SwitchesItsScale().model(), CachedDecoder().model(), threads=1)

    assert scenarios_of(report, "different") == {"long past"}
    assert "no cache can equal it" in report.notes[0]


class LargerAlone(Decoder):
    """A decoder whose feed-forward outputs double in a call of one token."""

    def feed_forward(self, hidden):
        alone = self.graph.op("Less", self.new_length(), self.graph.constant(2))
        factor = self.graph.op("Where", alone, self.number(2.0), self.number(1.0))
        return self.graph.op("Mul", super().feed_forward(hidden), factor)


def change_reference_at(levels, monkeypatch):
    """Replace the reference at some levels of graph optimization."""

    def open_changed(source, *, optimization, name, **options):
        changed = optimization in levels and name == "the reference model"
        source = LargerAlone().model() if changed else source
        return open_session(source, optimization=optimization, name=name, **options)

    monkeypatch.setattr(model_source, "open_session", open_changed)


@pytest.mark.parametrize(("levels", "level"), [({"all"}, "basic"), ({"all", "basic"}, "off")])
def test_lowers_the_optimization_level_at_which_the_reference_is_unstable(levels, level, monkeypatch):
    change_reference_at(levels, monkeypatch)
    right, wrong = verified(CachedDecoder().model()), verified(broken.WrongCorner().model())

    assert right.verdict == "same"
    assert wrong.layer == 1
    for report in (right, wrong):
        (note,) = report.notes
        assert "graph optimization `all`, the reference model's logits depend on later tokens" in note
        assert f"verified at `{level}`" in note


def test_keeps_the_optimization_level_if_the_reference_is_unstable_at_all(monkeypatch):
    change_reference_at({"all", "basic", "off"}, monkeypatch)
    everywhere, off = verified(CachedDecoder().model()), verified(CachedDecoder().model(), optimization="off")

    assert "no cache can equal it" in everywhere.notes[0]
    assert everywhere.notes == off.notes


def test_notes_a_reference_that_ignores_the_past():
    class SeesOnlyItself(Decoder):
        def causal(self, layer):
            return self.graph.op("Equal", self.row(self.key_index()), self.column(self.query_index()))

    class CachedSeesOnlyItself(SeesOnlyItself, CachedDecoder):
        pass

    report = verify(SeesOnlyItself().model(), CachedSeesOnlyItself().model(), threads=1)

    assert report.verdict == "same"
    assert "a wrong cache may go unnoticed" in report.notes[0]


def test_raises_if_the_reference_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="found nothing at"):
        verify(tmp_path / "missing.onnx", CachedDecoder().model())


def test_verifies_files_with_external_weights(tmp_path):
    for name, model in [("original", Decoder().model()), ("broken", broken.WrongCorner().model())]:
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / "model.onnx", save_as_external_data=True, size_threshold=1024, location="w")
    report = verify(tmp_path / "original", tmp_path / "broken" / "model.onnx", threads=1)

    assert report.layer == 1
    assert report.first_difference == "layers.1.context"


def test_report_can_be_written_as_json():
    facts = json.loads(json.dumps(verified(broken.NotANumber().model()).as_dict()))

    assert facts["ok"] is False
    assert facts["error"] == "inf"
    assert facts["comparisons"][1]["cache_differences"][0]["layer"] == 2
    assert facts["tolerance"]["bound"] == facts["bound"] == pytest.approx(1.5e-5)
    assert facts["coverage"]["batches"] == [1, 3]
    assert facts["seed"] == 0


def test_same_seed_gives_the_same_report():
    first, second = (verified(broken.MissingScale().model(), seed=7, explain=False) for _ in range(2))

    assert first.comparisons == second.comparisons
    assert first.comparisons != verified(broken.MissingScale().model(), seed=8, explain=False).comparisons


def test_calls_progress_before_each_scenario():
    calls = []
    verified(
        CachedDecoder().model(),
        progress=lambda *args: calls.append(args),
        lengths=TextLengths(short=6, long=6, batch=1),
    )

    assert [name for _, _, name in calls] == [
        "whole prefill",
        "token by token",
        "prefill and steps",
        "ragged chunks",
        "left padding",
    ]
    assert [(done, of) for done, of, _ in calls] == [(number, 5) for number in range(5)]


@pytest.mark.parametrize("rows", [20, 2])
def test_draws_only_token_ids_that_have_embeddings(rows):
    def with_few_embeddings(model):
        embeddings = next(tensor for tensor in model.graph.initializer if tensor.name == "model.embeddings")
        few = np.array(onnx.numpy_helper.to_array(embeddings)[:rows])
        embeddings.CopyFrom(onnx.numpy_helper.from_array(few, embeddings.name))
        return model

    report = verify(with_few_embeddings(Decoder().model()), with_few_embeddings(CachedDecoder().model()), threads=1)

    assert report.verdict == "same"


# Other outputs


def more_outputs(model, **outputs):
    """Give a model further outputs, by name and rank."""
    for name, rank in outputs.items():
        dims = [None] * rank
        model.graph.output.append(onnx.helper.make_tensor_value_info(name.replace("__", "."), 1, dims))
    return model


def test_compares_all_outputs_that_both_models_have():
    pair = [
        more_outputs(form.model(), layers__1__output=3, layers__0__scores=4) for form in (Decoder(), CachedDecoder())
    ]
    # the candidate lists them after its presents: they pair by name
    report = verify(*pair, threads=1)

    assert report.problems == ()
    wrong = verify(
        pair[0], more_outputs(broken.WrongCorner().model(), layers__1__output=3, layers__0__scores=4), threads=1
    )
    assert wrong.layer == 1


def test_names_an_output_that_is_worse_than_the_logits():
    class WrongScores(CachedDecoder):
        def model(self):
            model = super().model()
            wrong = next(node for node in model.graph.node if node.output[0] == "layers.2.scores")
            model.graph.node.append(onnx.helper.make_node("Neg", [wrong.output[0]], ["shown"]))
            return more_outputs(model, shown=4)

    class Scores(Decoder):
        def model(self):
            model = super().model()
            model.graph.node.append(onnx.helper.make_node("Identity", ["layers.2.scores"], ["shown"]))
            return more_outputs(model, shown=4)

    report = verify(Scores().model(), WrongScores().model(), threads=1)

    assert report.verdict == "different"
    assert {comparison.output for comparison in report.comparisons} == {"shown"}


def last_only(form):
    """Return the model with logits of the last token only, `[batch, 1, vocabulary]`."""

    class LastOnly(form):
        def model(self):
            model = super().model()
            head = next(node for node in model.graph.node if node.output[0] == "logits")
            head.output[0] = "all_logits"
            bounds = {"first": [-1], "end": [2**31], "axis": [1]}
            for name, value in bounds.items():
                model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
            model.graph.node.append(onnx.helper.make_node("Slice", ["all_logits", *bounds], ["logits"]))
            model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
            return model

    return LastOnly().model()


def test_compares_logits_of_the_last_token_only():
    report = verify(last_only(Decoder), last_only(CachedDecoder), threads=1)
    wrong = verify(last_only(Decoder), last_only(broken.WrongCorner), threads=1)

    assert report.problems == ()
    assert scenarios_of(wrong, "different") == CHUNKED
    assert wrong.layer == 1


def test_compares_the_last_token_if_the_candidate_declares_one():
    assert verify(original(), last_only(CachedDecoder), threads=1).verdict == "same"
    assert verify(original(), last_only(broken.WrongCorner), threads=1).verdict == "different"


def test_reports_logits_of_another_shape():
    model = last_only(CachedDecoder)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    report = verify(original(), model, threads=1)

    assert not report.ok
    assert "output `logits` has shape [1, 1, 61], expected a part of [1, 14, 61]" in report.problems[0]


@pytest.mark.parametrize(("dtype", "verdict"), [("DOUBLE", "same"), ("INT32", "different")])
def test_reports_logits_of_another_type(dtype, verdict):
    class OfAnotherType(CachedDecoder):
        def model(self):
            model = super().model()
            to = getattr(onnx.TensorProto, dtype)
            head = next(node for node in model.graph.node if node.output[0] == "logits")
            head.output[0] = "single"
            model.graph.node.append(onnx.helper.make_node("Cast", ["single"], ["logits"], to=to))
            model.graph.output[0].type.tensor_type.elem_type = to
            return model

    report = verified(OfAnotherType().model())
    words = report.notes if verdict == "same" else report.problems

    assert report.verdict == verdict
    assert any("in the reference model float32" in line for line in words)


def test_skips_a_text_on_which_the_reference_returns_nan():
    class NothingForPadding(Decoder):
        def scale(self, layer):
            most = self.graph.op("ReduceMin", "attention_mask", keepdims=0)
            padded = self.graph.op("Equal", most, self.graph.constant(0))
            return self.graph.op("Where", padded, self.number(float("nan")), super().scale(layer))

    report = verify(NothingForPadding().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert report.notes == ("left padding was not compared: the reference model's `logits` are not numbers",)


def test_asks_a_first_call_of_padding_alone():
    class NothingForPaddingAlone(CachedDecoder):
        def scale(self, layer):
            any_token = self.graph.op("ReduceMax", "attention_mask", self.graph.constant([1]), keepdims=1)
            alone = self.graph.op("Equal", any_token, self.graph.constant(0))  # [batch, 1]
            alone = self.graph.op("Unsqueeze", alone, self.graph.constant([2, 3]))
            return self.graph.op("Where", alone, self.number(float("nan")), super().scale(layer))

    report = verified(NothingForPaddingAlone().model(), effort="normal")

    assert scenarios_of(report, "different") == {"first call of padding"}
    assert scenarios_of(verified(CachedDecoder().model(), effort="normal"), "same") >= {"first call of padding"}


def test_skips_a_text_on_which_the_reference_fails():
    class FailsAtPadding(Decoder):
        def scale(self, layer):
            most = self.graph.op("ReduceMin", "attention_mask", keepdims=0)
            numbers = self.graph.constant([0.0, self.config.head_dim**-0.5], "float32")
            padded = self.graph.op("Equal", most, self.graph.constant(0))
            place = self.graph.op("Where", padded, self.graph.constant(5), self.graph.constant(1))
            return self.graph.op("Gather", numbers, place)

    report = verify(FailsAtPadding().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert "left padding was not compared: the reference model fails: " in report.notes[0]


def test_runs_a_reference_that_fails_on_batches_with_one_row():
    class OneRow(Decoder):
        def heads(self, hidden, name, count, gain=1.0):
            one = self.graph.constant([1, -1, self.config.hidden])
            return super().heads(self.graph.op("Reshape", hidden, one), name, count, gain)

    report = verify(OneRow().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert {one.batch for one in report.comparisons} == {1}


@pytest.mark.parametrize(("rows", "types"), [(2, 2), (1, 1)])
def test_draws_token_types_if_the_model_has_several(rows, types):
    class Typed:
        def declare(self):
            super().declare()
            self.graph.input("token_type_ids", onnx.TensorProto.INT64, self.token_dims())

        def norm(self, hidden):
            if hidden != "layers.0.after_attention":
                return super().norm(hidden)
            table = self.graph.constant(np.linspace(0, 3, rows * 32).reshape(rows, 32), "float32")
            return super().norm(self.graph.op("Add", hidden, self.graph.op("Gather", table, "token_type_ids")))

    plain, cached = (type("TypedDecoder", (Typed, form), {})().model() for form in (Decoder, CachedDecoder))

    assert verify(plain, cached, threads=1).verdict == "same"


def test_reports_a_low_agreement():
    """Each token has a twin of slightly lower logit, in the wrong model of slightly higher logit."""

    def with_twins(form, favour):
        class Twins(form):
            def weight(self, name, rows, columns, gain=1.0):
                value = super().weight(name, rows, columns, gain)
                if name != "head":
                    return value
                pairs = self.graph.constant(np.arange(columns) // 2)
                return self.graph.op("Gather", value, pairs, axis=1)

        model = Twins(Config(vocabulary=60)).model()
        head = next(node for node in model.graph.node if node.output[0] == "logits")
        head.output[0] = "fair"
        bias = np.tile(np.array([favour, -favour], np.float32), 30)
        model.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
        model.graph.node.append(onnx.helper.make_node("Add", ["fair", "bias"], ["logits"]))
        model.graph.node.append(onnx.helper.make_node("Cast", ["logits"], ["coarse"], to=onnx.TensorProto.BFLOAT16))
        return model

    right = verify(with_twins(Decoder, 0.115), with_twins(CachedDecoder, 0.115), threads=1)
    wrong = verify(with_twins(Decoder, 0.115), with_twins(CachedDecoder, -0.115), threads=1)

    assert (right.arithmetic, right.problems) == ("bfloat16", ())
    assert wrong.error < wrong.bound
    assert "the most likely token agrees at 0% of the tokens (90% required)" in wrong.problems[0]


def test_feeds_each_model_its_input_types():
    """The candidate takes int32, the reference int64."""
    model = CachedDecoder(Config()).model()
    for value in model.graph.input:
        if value.name == "input_ids":
            value.type.tensor_type.elem_type = onnx.TensorProto.INT32

    report = verify(Decoder(Config()).model(), model, threads=1)

    assert report.verdict == "same"
