"""The judge is judged: right injections are accepted, wrong ones rejected at the right place."""

import json
from functools import cache

import broken_decoders as shelf
import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder

from kvsurgeon.errors import InputError
from kvsurgeon.parity import TextLengths, verifier, verify
from kvsurgeon.runtime import open_session

CHUNKED = {"token by token", "prefill and steps", "ragged chunks", "batch", "left padding", "long past"}
EVERY = {"whole prefill", *CHUNKED}
SEVERAL_AT_ONCE = {"ragged chunks", "batch", "left padding", "long past"}  # calls of several tokens with a past


@cache
def original(config: Config | None = None) -> onnx.ModelProto:
    return Decoder(config).model()


def judged(injected: onnx.ModelProto, **options):
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
def test_a_right_injection_is_accepted(config):
    report = verify(original(config), CachedDecoder(config).model(), threads=1)

    assert report.problems == ()
    assert report.verdict == "same"
    assert report.error < 1e-4
    assert {trial.scenario for trial in report.trials} == (EVERY if config.attention_mask else EVERY - {"left padding"})


# broken step, scenarios that must fail, layer at fault, words that must be said
WRONG = [
    (shelf.WrongAxis, EVERY, None, "layers.1."),
    (shelf.NewFirst, CHUNKED, 1, "`present.1.key` does not begin with the past of layer 1"),
    (shelf.ForgottenOffset, CHUNKED, 0, "the key of layer 0 is wrong from token 1 on, and only it"),
    (shelf.ForgottenOffsetInOneLayer, CHUNKED, 1, "the key of layer 1 is wrong from token 1 on, and only it"),
    (shelf.StaleRotary, CHUNKED, 0, "the key of layer 0 is wrong from token 1 on, and only it"),
    (shelf.SwappedKeyValue, CHUNKED, 1, "but with `past_key_values.1.value`"),
    (shelf.SwappedLayers, CHUNKED, 1, "but with `past_key_values.2.key`"),
    (shelf.WrongCorner, CHUNKED, 1, "the attention of layer 1 is at fault"),
    (shelf.MaskDropped, SEVERAL_AT_ONCE, 1, "the attention of layer 1 is at fault"),
    (shelf.LayerWithoutCache, CHUNKED, 1, "the attention of layer 1, which has no cache of its own, is at fault"),
    (shelf.WindowOffByOne, EVERY, None, "`layers.1.context`"),
    (shelf.PaddingIgnored, {"left padding"}, None, "`layers.0.context`"),
    (shelf.PaddingForgotten, {"left padding"}, 0, "the attention of layer 0 is at fault"),
    (shelf.PastTiled, CHUNKED, 1, "the attention of layer 1 is at fault"),
    (shelf.WithoutNewest, EVERY, 1, "at `present.1.key`"),
    (shelf.ScaleForgotten, CHUNKED, 1, "the attention of layer 1 is at fault"),
    (shelf.RotatedTwice, CHUNKED, 1, "`present.1.key` does not begin with the past of layer 1"),
    (shelf.RowsMixed, {"batch", "left padding"}, 1, "`present.1.key` does not begin with the past of layer 1"),
    (shelf.ForgetsFarPast, {"long past"}, None, "`layers.2.context`"),
    (shelf.WrongAtOnce, EVERY, None, "already when the whole text is given in one call"),
    (shelf.LastLayerUncausal, SEVERAL_AT_ONCE, 2, "the attention of the last layer, 2, is at fault"),
    (shelf.ShiftedAtTheDoor, CHUNKED, 0, "key and value of the first layer, 0, are wrong from token 1 on"),
    (shelf.NotANumber, CHUNKED, 1, "`logits` differs by inf"),
    (shelf.OrderOfOutputs, CHUNKED, 1, "`past_key_values.1.key` and `present.1.value` stand at the same place"),
]


@pytest.mark.parametrize(("broken", "scenarios", "layer", "words"), WRONG, ids=[row[0].__name__ for row in WRONG])
def test_a_wrong_injection_is_rejected_at_the_right_place(broken, scenarios, layer, words):
    report = judged(broken().model())

    assert not report.ok
    assert {trial.scenario for trial in report.trials if trial.verdict == "different"} == scenarios
    assert report.layer == layer
    assert words in "\n".join(report.problems)


def test_every_mistake_on_the_shelf_is_tried():
    mistakes = {
        value for value in vars(shelf).values() if isinstance(value, type) and value.__module__ == shelf.__name__
    }

    assert mistakes == {row[0] for row in WRONG}


def test_a_mistake_is_seen_in_float16_too():
    config = Config(dtype="float16")
    report = verify(original(config), shelf.WrongCorner(config).model(), threads=1)

    assert report.arithmetic == "float16"
    assert (report.verdict, report.layer) == ("different", 1)


@pytest.mark.parametrize("static", [(1, 24), (2, 24)], ids=["batch 1", "batch 2"])
def test_a_static_original_is_asked_at_its_only_length(static):
    config = Config(static=static)
    report = verify(original(config), CachedDecoder(config).model(), threads=1)

    assert report.verdict == "same"
    assert max(trial.length for trial in report.trials) == 24
    assert {trial.scenario for trial in report.trials} == EVERY - {"long past"}
    assert not verify(original(config), shelf.PaddingForgotten(config).model(), threads=1).ok


def test_a_bounded_original_is_asked_no_further_than_it_reaches():
    config = Config(max_length=40)
    report = verify(original(config), CachedDecoder(config).model(), threads=1)

    assert report.verdict == "same"
    assert max(trial.length for trial in report.trials) == 40
    assert report.notes == ("the longest text has 40 tokens: the original takes no more",)


def test_a_cached_model_with_a_fixed_batch_is_judged_at_that_batch():
    class BatchOfOne(CachedDecoder):
        def model(self):
            model = super().model()
            for value in [*model.graph.input, *model.graph.output]:
                value.type.tensor_type.shape.dim[0].dim_value = 1
            return model

    report = judged(BatchOfOne().model())

    assert report.verdict == "same"
    assert {trial.batch for trial in report.trials} == {1}
    assert "left padding" in {trial.scenario for trial in report.trials}


def test_an_original_that_is_right_at_batch_1_only_is_not_asked_for_more():
    class ScaleFollowsBatch(Decoder):
        def scale(self, layer):
            many = self.graph.op("Greater", self.size("input_ids", 0), self.graph.constant(1))
            return self.graph.op("Where", many, self.number(1.0), super().scale(layer))

    report = verify(ScaleFollowsBatch().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert {trial.batch for trial in report.trials} == {1}
    assert report.notes == ("the original is right at batch 1 only: batches were not tried",)


def test_the_same_model_twice_has_no_cache():
    report = judged(original())

    assert report.verdict == "different"
    assert report.problems == ("expected past inputs that the original lacks, found none: the model has no cache",)


def test_a_missing_present_is_a_fault_and_not_a_crash():
    model = CachedDecoder().model()
    model.graph.output.pop()

    assert judged(model).problems == ("expected as many present outputs as past inputs, found 5 and 6",)


def test_a_missing_output_is_a_fault():
    class Two(Decoder):
        def model(self):
            model = super().model()
            model.graph.output.append(onnx.helper.make_tensor_value_info("layers.0.output", 1, ["b", "s", 32]))
            return model

    report = verify(Two().model(), CachedDecoder().model(), threads=1)

    assert report.problems == ("the original's output `layers.0.output` is missing",)


def test_a_model_that_cannot_be_opened_is_a_fault():
    model = CachedDecoder().model()
    model.graph.node[0].input[0] = "nowhere"
    report = judged(model)

    assert report.verdict == "different"
    assert "onnxruntime does not accept the model with a cache" in report.problems[0]


def test_an_original_that_cannot_be_run_is_no_success():
    unknown = Decoder().model()
    unknown.graph.node[-1].op_type = "OfNoRuntime"
    unknown.graph.node[-1].domain = "nobody"
    unknown.opset_import.append(onnx.helper.make_opsetid("nobody", 1))
    report = verify(unknown, CachedDecoder().model(), threads=1)

    assert (report.verdict, report.ok) == ("unknown", False)
    assert "OfNoRuntime" in report.problems[0]


def test_an_original_that_fails_on_any_text_is_no_success():
    class Failing(Decoder):
        def key_index(self):
            return self.range(0, self.graph.constant(7))  # fits no mask but that of 7 tokens

    report = verify(Failing().model(), CachedDecoder().model(), threads=1)

    assert (report.verdict, report.ok, report.trials) == ("unknown", False, ())


def test_an_original_that_changes_with_the_length_is_named():
    class SwitchesItsScale(Decoder):
        def scale(self, layer):
            long = self.graph.op("Greater", self.new_length(), self.graph.constant(60))
            return self.graph.op("Where", long, self.number(1.0), super().scale(layer))

    report = verify(SwitchesItsScale().model(), CachedDecoder().model(), threads=1)

    assert {trial.scenario for trial in report.trials if trial.verdict == "different"} == {"long past"}
    assert "no cache can equal it" in report.notes[0]


class LouderAlone(Decoder):
    """What its layers add is twice as much in a call of one token."""

    def feed_forward(self, hidden):
        alone = self.graph.op("Less", self.new_length(), self.graph.constant(2))
        factor = self.graph.op("Where", alone, self.number(2.0), self.number(1.0))
        return self.graph.op("Mul", super().feed_forward(hidden), factor)


def bent_by(levels, monkeypatch):
    """onnxruntime makes something else of the original where it may rewrite it so far."""

    def open_bent(source, *, optimisation, name, **options):
        bent = optimisation in levels and name == "the original"
        source = LouderAlone().model() if bent else source
        return open_session(source, optimisation=optimisation, name=name, **options)

    monkeypatch.setattr(verifier, "open_session", open_bent)


@pytest.mark.parametrize(("levels", "level"), [({"all"}, "basic"), ({"all", "basic"}, "off")])
def test_where_optimisation_bends_the_original_both_are_judged_at_a_lower_one(levels, level, monkeypatch):
    bent_by(levels, monkeypatch)
    right, wrong = judged(CachedDecoder().model()), judged(shelf.WrongCorner().model())

    assert right.verdict == "same"
    assert wrong.layer == 1
    for report in (right, wrong):
        (note,) = report.notes
        assert "graph optimisation `all` makes the original give other logits" in note
        assert f"judged at `{level}`" in note


def test_an_original_that_is_bent_at_every_level_is_judged_as_asked(monkeypatch):
    bent_by({"all", "basic", "off"}, monkeypatch)
    everywhere, off = judged(CachedDecoder().model()), judged(CachedDecoder().model(), optimisation="off")

    assert "no cache can equal it" in everywhere.notes[0]
    assert everywhere.notes == off.notes


def test_an_original_blind_to_the_past_is_named():
    class SeesOnlyItself(Decoder):
        def causal(self, layer):
            return self.graph.op("Equal", self.row(self.key_index()), self.column(self.query_index()))

    class CachedSeesOnlyItself(SeesOnlyItself, CachedDecoder):
        pass

    report = verify(SeesOnlyItself().model(), CachedSeesOnlyItself().model(), threads=1)

    assert report.verdict == "same"
    assert "a wrong cache might not be seen" in report.notes[0]


def test_an_unreadable_original_is_the_callers_error(tmp_path):
    with pytest.raises(InputError, match="found nothing at"):
        verify(tmp_path / "missing.onnx", CachedDecoder().model())


def test_models_are_judged_from_files_with_weights_beside_them(tmp_path):
    for name, model in [("original", Decoder().model()), ("broken", shelf.WrongCorner().model())]:
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / "model.onnx", save_as_external_data=True, size_threshold=1024, location="w")
    report = verify(tmp_path / "original", tmp_path / "broken" / "model.onnx", threads=1)

    assert report.layer == 1
    assert report.first_difference == "layers.1.context"


def test_a_report_can_be_written_as_json():
    facts = json.loads(json.dumps(judged(shelf.NotANumber().model()).as_dict()))

    assert facts["ok"] is False
    assert facts["error"] == "inf"
    assert facts["trials"][1]["caches"][0]["layer"] == 2
    assert facts["tolerance"]["error"] == 3e-4


def test_the_same_seed_gives_the_same_report():
    first, second = (judged(shelf.ScaleForgotten().model(), seed=7, explain=False) for _ in range(2))

    assert first.trials == second.trials
    assert first.trials != judged(shelf.ScaleForgotten().model(), seed=8, explain=False).trials


def test_progress_is_told_before_each_trial():
    said = []
    judged(
        CachedDecoder().model(), progress=lambda *told: said.append(told), lengths=TextLengths(short=6, long=6, batch=1)
    )

    assert [name for _, _, name in said] == [
        "whole prefill",
        "token by token",
        "prefill and steps",
        "ragged chunks",
        "left padding",
    ]
    assert [(done, of) for done, of, _ in said] == [(number, 5) for number in range(5)]


@pytest.mark.parametrize("rows", [20, 2])
def test_ids_that_the_embeddings_do_not_hold_are_not_drawn(rows):
    def with_few_embeddings(model):
        embeddings = next(tensor for tensor in model.graph.initializer if tensor.name == "model.embeddings")
        few = np.array(onnx.numpy_helper.to_array(embeddings)[:rows])
        embeddings.CopyFrom(onnx.numpy_helper.from_array(few, embeddings.name))
        return model

    report = verify(with_few_embeddings(Decoder().model()), with_few_embeddings(CachedDecoder().model()), threads=1)

    assert report.verdict == "same"


# Outputs of other kinds


def more_outputs(model, **outputs):
    """Give a model further outputs: values by name, with the rank that each has."""
    for name, rank in outputs.items():
        dims = [None] * rank
        model.graph.output.append(onnx.helper.make_tensor_value_info(name.replace("__", "."), 1, dims))
    return model


def test_every_output_that_both_have_is_compared():
    pair = [
        more_outputs(form.model(), layers__1__output=3, layers__0__scores=4) for form in (Decoder(), CachedDecoder())
    ]
    # the cached one lists them behind its presents; they pair by name
    report = verify(*pair, threads=1)

    assert report.problems == ()
    wrong = verify(
        pair[0], more_outputs(shelf.WrongCorner().model(), layers__1__output=3, layers__0__scores=4), threads=1
    )
    assert wrong.layer == 1


def test_an_output_that_is_worse_than_the_logits_is_the_one_named():
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
    assert {trial.output for trial in report.trials} == {"shown"}


def last_only(form):
    """The model, with logits of the last token alone: `[batch, 1, vocabulary]`."""

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


def test_logits_of_the_last_token_alone_are_compared_there():
    report = verify(last_only(Decoder), last_only(CachedDecoder), threads=1)
    wrong = verify(last_only(Decoder), last_only(shelf.WrongCorner), threads=1)

    assert report.problems == ()
    assert {trial.scenario for trial in wrong.trials if trial.verdict == "different"} == CHUNKED
    assert wrong.layer == 1


def test_logits_of_another_shape_are_named():
    report = verify(original(), last_only(CachedDecoder), threads=1)

    assert not report.ok
    assert (
        "the output `logits` has [1, 1, 61], where the original's for the whole text is [1, 14, 61]"
        in report.problems[0]
    )


def test_another_type_of_logits_is_a_fault():
    class InDouble(CachedDecoder):
        def model(self):
            model = super().model()
            head = next(node for node in model.graph.node if node.output[0] == "logits")
            head.output[0] = "single"
            model.graph.node.append(onnx.helper.make_node("Cast", ["single"], ["logits"], to=onnx.TensorProto.DOUBLE))
            model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
            return model

    assert judged(InDouble().model()).problems == ("the output `logits` is float64, in the original float32",)


def test_a_text_on_which_the_original_gives_no_numbers_is_told_and_not_judged():
    class NothingForPadding(Decoder):
        def scale(self, layer):
            most = self.graph.op("ReduceMin", "attention_mask", keepdims=0)
            padded = self.graph.op("Equal", most, self.graph.constant(0))
            return self.graph.op("Where", padded, self.number(float("nan")), super().scale(layer))

    report = verify(NothingForPadding().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert report.notes == ("left padding was not judged: the original's logits are not numbers",)


def test_an_original_that_fails_at_padding_is_told_and_not_judged():
    class FailsAtPadding(Decoder):
        def scale(self, layer):
            most = self.graph.op("ReduceMin", "attention_mask", keepdims=0)
            numbers = self.graph.constant([0.0, self.config.head_dim**-0.5], "float32")
            padded = self.graph.op("Equal", most, self.graph.constant(0))
            place = self.graph.op("Where", padded, self.graph.constant(5), self.graph.constant(1))
            return self.graph.op("Gather", numbers, place)

    report = verify(FailsAtPadding().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert "left padding was not judged: the original cannot be run on it: " in report.notes[0]


def test_an_original_that_fails_at_a_batch_is_judged_row_by_row():
    class OneRow(Decoder):
        def heads(self, hidden, name, count, gain=1.0):
            one = self.graph.constant([1, -1, self.config.hidden])
            return super().heads(self.graph.op("Reshape", hidden, one), name, count, gain)

    report = verify(OneRow().model(), CachedDecoder().model(), threads=1)

    assert report.verdict == "same"
    assert {trial.batch for trial in report.trials} == {1}


@pytest.mark.parametrize(("rows", "types"), [(2, 2), (1, 1)])
def test_token_types_are_drawn_where_the_model_has_several(rows, types):
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


def test_a_likeliest_token_that_differs_too_often_is_a_problem_of_its_own():
    """Every token has a twin that is a little less likely; in the wrong model a little more."""

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
    assert wrong.error < wrong.tolerance.error
    assert "the likeliest token is the same at 0% (90% needed)" in wrong.problems[0]


def test_each_model_is_given_its_own_types():
    """What the result takes as 32 bits, or as another mask of the same name, the original is given as it wants it."""
    model = CachedDecoder(Config()).model()
    for value in model.graph.input:
        if value.name == "input_ids":
            value.type.tensor_type.elem_type = onnx.TensorProto.INT32

    report = verify(Decoder(Config()).model(), model, threads=1)

    assert report.verdict == "same"
