"""Pipelines: parsing, validity of each pass, error messages, verification."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from decoders import CachedDecoder, Config, Decoder

from kvsurgeon.errors import ParityError, PassError, PluginError, UnsupportedError, UsageError, WeightsError
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.options import options_of
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.registry import PASSES
from kvsurgeon.workflow.run_and_save import run_and_save


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Do nothing.

    Attributes:
        count: How often,
            in two lines.
        mode: How.
    """

    name: ClassVar[str] = "sample"

    count: int = 1
    factor: float = 1.0
    wanted: bool = False
    title: str = "{layer}.key"
    lengths: tuple[int, ...] = ()
    window: Optional[int] = None  # noqa: UP045  # both forms are in use
    either: int | str | None = 3
    mode: Literal["a", "b"] = "a"
    pair: tuple[int, str] = (0, "")
    path: Path = Path()

    def apply(self, subject: Subject) -> Outcome:
        return Unchanged(reason="it is a sample")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Need an option."""

    name: ClassVar[str] = "needs"
    wide_name: int

    def __post_init__(self):
        if self.wide_name < 0:
            raise ValueError("wide_name is below 0")

    def apply(self, subject: Subject) -> Outcome:
        return Unchanged(reason="it only needs")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(PASSES.built_in, "sample", f"{__name__}:Sample")
    monkeypatch.setitem(PASSES.built_in, "needs", f"{__name__}:Needs")


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    return Decoder(Config()).model()


# Text


def test_a_text_lists_passes_and_options_in_order():
    passes = Pipeline.parse("sample, needs{wide-name=2},sample{count=5}").passes
    assert passes == (Sample(), Needs(wide_name=2), Sample(count=5))


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("count=3", "count", 3),
        ("factor=1e-3", "factor", 1e-3),
        ("wanted=true", "wanted", True),
        ("wanted=No", "wanted", False),
        ("title=past.{layer}.{kind}", "title", "past.{layer}.{kind}"),
        ('title="a,b=c"', "title", "a,b=c"),
        ("lengths=1,2,3", "lengths", (1, 2, 3)),
        ("lengths=", "lengths", ()),
        ("window=4", "window", 4),
        ("window=none", "window", None),
        ("either=4", "either", 4),
        ("either=four", "either", "four"),
        ("mode=b", "mode", "b"),
        ("pair=4,x", "pair", (4, "x")),
        ("path=a/b", "path", Path("a/b")),
    ],
)
def test_option_values_have_the_types_of_the_fields(text, field, value):
    (one,) = Pipeline.parse(f"sample{{{text}}}").passes
    assert getattr(one, field) == value
    assert type(getattr(one, field)) is type(value)


def test_a_list_ends_at_the_next_option():
    assert Pipeline.parse("sample{lengths=1,2,count=4}").passes == (Sample(lengths=(1, 2), count=4),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample{counts=1}", r"pass sample has no option counts; did you mean count\?"),
        ("sample{count=many}", "option count: expected int, found 'many'"),
        ("sample{mode=c}", r"option mode: expected a\|b, found 'c'"),
        ("sample{wanted=perhaps}", r"option wanted: expected true\|false, found 'perhaps'"),
        ("sample{pair=1}", "option pair: expected int,text, found '1'"),
        ("sample{window=x}", r"option window: expected int\|none, found 'x'"),
        ("sample{count=1,count=2}", "option count is given twice"),
        ("sample{3}", "expected option=value, found '3'"),
        ("needs", r"pass needs requires wide-name: write needs\{wide-name=...\}"),
        ("needs{wide_name=-1}", "pass needs: wide_name is below 0"),
        ("sample{count=1", r"found '\{count=1' - at character 6|found 'sample\{count=1' - at character 0"),
        ("", "expected passes such as"),
        ("sample,", "expected passes such as"),
        ("nothing", "unknown pass 'nothing'"),
    ],
)
def test_a_malformed_text_is_an_error(text, message):
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(text)


def test_option_help_comes_from_the_docstring():
    explained = {option.field: option.help for option in options_of(Sample)}
    assert (explained["count"], explained["mode"], explained["path"]) == ("How often, in two lines.", "How.", "")


# Passes


def test_functions_are_passes(decoder):
    def name_it(model: ir.Model, called: str = "renamed") -> None:
        model.graph.name = called

    def count(subject: Subject) -> Outcome:
        return Changed(edits=7, notes=("counted",))

    result = Pipeline((name_it, count, count, Sample())).run(decoder)
    assert result.model.graph.name == "renamed"
    assert [step.name for step in result.steps] == ["name-it", "count", "count", "sample"]
    assert result.changed
    assert result.notes == ("counted",)  # once
    assert decoder.graph.name != "renamed"


def test_a_function_may_return_another_model(decoder):
    def replace(model: ir.Model) -> ir.Model:
        found = ir.from_proto(ir.to_proto(model))
        found.graph.name = "another"
        return found

    def mistake(model: ir.Model) -> ir.Model:
        return 3

    assert Pipeline((replace,)).run(decoder).model.graph.name == "another"
    with pytest.raises(
        PassError, match=r"pass mistake raised TypeError: expected it to return an ir.Model or None, found int"
    ):
        Pipeline((mistake,)).run(decoder)


def test_a_function_may_be_annotated_for_type_checkers_only(decoder):
    def edit(graph): ...

    edit.__annotations__ = {"graph": "gs.Graph", "times": "Unknown"}
    assert not Pipeline((edit,)).run(decoder).changed


@pytest.mark.parametrize("wrong", [Sample, 3, "sample"])
def test_an_object_that_is_no_pass_is_an_error(wrong):
    with pytest.raises(UsageError, match="expected a pass or a function"):
        Pipeline((wrong,))


def test_a_function_of_an_unknown_type_is_an_error():
    def edit(graph: onnx.GraphProto) -> None: ...

    with pytest.raises(PluginError, match=r"pass edit: .*found GraphProto"):
        Pipeline((edit,))


def test_a_parameter_may_not_be_called_name():
    def edit(model: ir.Model, name: str = "x") -> None: ...

    with pytest.raises(PluginError, match="pass edit: no parameter can be called name"):
        Pipeline((edit,))


def test_an_exception_of_a_pass_names_it_and_the_passes_before_it(decoder):
    def fails(model: ir.Model) -> None:
        raise KeyError("x")

    with pytest.raises(PassError, match=r"pass fails raised KeyError: 'x' \(passes before it: sample\)") as caught:
        Pipeline((Sample(), fails)).run(decoder)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_a_built_in_pass_is_not_wrapped(decoder, monkeypatch):
    def refuse(self, subject):
        raise UnsupportedError("no", at="here")

    monkeypatch.setattr(Sample, "apply", refuse)
    with pytest.raises(UnsupportedError, match="no - at `here`"):
        Pipeline((Sample(),)).run(decoder)


def test_an_error_of_a_custom_pass_names_it(decoder):
    def declines(model: ir.Model) -> None:
        raise UnsupportedError("too small")

    with pytest.raises(PassError, match="pass declines failed: too small"):
        Pipeline((declines,)).run(decoder)


def removes_an_initializer(model: ir.Model) -> None:
    name = next(name for name, value in model.graph.initializers.items() if value.uses())
    model.graph.initializers.pop(name)


def reverses(model: ir.Model) -> None:
    nodes = list(model.graph)
    model.graph.remove(nodes)
    model.graph.extend(reversed(nodes))


def forgets_a_type(model: ir.Model) -> None:
    model.graph.outputs[0].type = None


def names_twice(model: ir.Model) -> None:
    first, second = list(model.graph)[:2]
    second.outputs[0].name = first.outputs[0].name


def invents_an_operator(model: ir.Model) -> None:
    next(iter(model.graph)).op_type = "Nonsense"


def drops_an_output(model: ir.Model) -> None:
    model.graph.outputs[0] = ir.Value(name="logits", type=model.graph.outputs[0].type)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (removes_an_initializer, "found no node, input or initializer of that name"),
        (reverses, "found a later node that computes it"),
        (forgets_a_type, "graph output `logits` has no type|output `logits` has no type"),
        (names_twice, "duplicate name"),
        (invents_an_operator, "No Op registered for Nonsense"),
        (drops_an_output, "graph output `logits` is not computed by any node"),
    ],
)
def test_an_invalid_graph_names_the_pass_that_left_it(decoder, breaks, message):
    name = breaks.__name__.replace("_", "-")
    with pytest.raises(PassError, match=rf"pass {name} left an invalid graph: .*({message})"):
        Pipeline((Sample(), breaks)).run(decoder)


def test_a_model_that_onnx_checker_rejects_from_the_start_is_accepted(decoder):
    odd = onnx.ModelProto()
    odd.CopyFrom(decoder)
    odd.graph.node[0].op_type = "OnlyInOnnxruntime"

    def touch(model: ir.Model) -> None:
        model.graph.name = "touched"

    assert Pipeline((touch,)).run(odd).changed


def test_a_result_that_is_no_outcome_is_an_error(decoder):
    @dataclass(frozen=True)
    class Silent:
        name: ClassVar[str] = "silent"

        def apply(self, subject):
            return True

    with pytest.raises(PassError, match="pass silent: expected it to return Changed or Unchanged, found True"):
        Pipeline((Silent(),)).run(decoder)


# Verification


def gives_a_cache(subject: Subject) -> None:
    subject.model = ir.from_proto(CachedDecoder(Config()).model())


def halves_the_logits(graph: gs.Graph) -> None:
    import numpy as np

    logits = graph.outputs[0]
    inner = gs.Variable("whole_logits", dtype=logits.dtype)
    logits.inputs[0].outputs = [inner]
    half = gs.Constant("half", np.array(0.5, np.float32))
    graph.nodes.append(gs.Node("Mul", "halve", inputs=[inner, half], outputs=[logits]))


def renames(model: ir.Model) -> None:
    model.graph.name = "another"


def test_verify_each_verifies_after_every_pass(decoder):
    seen = []
    Pipeline((renames, gives_a_cache)).run(decoder, verify_each=True, on_pass=lambda *args: seen.append(args[:2]))
    assert seen == [(0, "original"), (1, "renames"), (2, "gives-a-cache")]
    with pytest.raises(
        ParityError, match=r"after pass halves-the-logits \(passes: renames, halves-the-logits\): whole prefill: error"
    ):
        Pipeline((renames, halves_the_logits, gives_a_cache)).run(decoder, verify_each=True)


def test_models_with_a_cache_are_verified():
    cached = CachedDecoder(Config()).model()
    assert run_and_save(cached, Pipeline((renames,))).verification.verdict == "same"
    with pytest.raises(ParityError, match="logits"):
        run_and_save(cached, Pipeline((halves_the_logits,)))


def test_nothing_is_written_if_verification_fails(decoder, tmp_path):
    with pytest.raises(ParityError, match="the results of the model differ from those of the original"):
        run_and_save(decoder, Pipeline((halves_the_logits,)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unchanged_model_is_an_error(decoder, tmp_path):
    with pytest.raises(UnsupportedError, match="the model is unchanged: sample: it is a sample"):
        run_and_save(decoder, Pipeline((Sample(),)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_run_is_not_verified(decoder, tmp_path):
    odd = onnx.ModelProto()
    odd.CopyFrom(decoder)
    table = next(node for node in odd.graph.node if node.op_type == "Gather")
    odd.graph.node.insert(0, onnx.helper.make_node("Nowhere", ["input_ids"], ["odd_ids"], domain="unknown"))
    odd.opset_import.append(onnx.helper.make_opsetid("unknown", 1))
    table.input[1] = "odd_ids"
    with pytest.raises(
        UnsupportedError, match=r"cannot verify the result: .*skip verification by --no-verify, or verify=False"
    ):
        run_and_save(odd, Pipeline((renames,)), tmp_path / "out")
    assert (
        run_and_save(odd, Pipeline((renames,)), tmp_path / "out", verify=False).path == tmp_path / "out" / "model.onnx"
    )


def test_verification_needs_the_folder_of_external_data(decoder, tmp_path):
    onnx.save(decoder, tmp_path / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=1024)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    with pytest.raises(WeightsError, match=r"\(`w.data`\), found none; give folder=..., or verify=False"):
        run_and_save(proto, Pipeline((renames,)))
    assert run_and_save(proto, Pipeline((renames,)), verify=False).verification is None
    assert run_and_save(proto, Pipeline((renames,)), folder=tmp_path).verification.verdict == "same"
