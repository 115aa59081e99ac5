"""Commands: output, exit codes, error messages of one line, and files only on success."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from exports import after
from packages import install
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import kvsurgeon
from kvsurgeon.cli.main import run
from kvsurgeon.dataflow import shape_inference
from kvsurgeon.ops.operator import Operator
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.workflow import registry

MAIN = "from kvsurgeon.cli.main import main; main()"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a decoder without a cache, its weights in a file, and one with a cache."""
    folder = tmp_path_factory.mktemp("models")
    outside = {"save_as_external_data": True, "location": "model.data", "size_threshold": 1024}
    for name, model in {"given": Decoder(Config()).model(), "cached": CachedDecoder(Config()).model()}.items():
        (folder / name).mkdir()
        onnx.save(model, folder / name / "model.onnx", **outside)
    (folder / "given" / "config.json").write_text('{"model_type": "tiny"}')
    return folder


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_passes")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def shell(capsys):
    """Run a command, and return its exit code, stdout and stderr."""

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def subprocess_of(*arguments, **options):
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# Help


def test_help_lists_commands_and_passes(shell, site):
    install("sample", site)
    code, out, err = shell("--help")
    commands = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines() if line[2:3].strip()]
    assert (code, err) == (0, "")
    assert set(commands) >= {"inspect", "inject", "annotate", "swap-addends", "run", "passes", "verify", "demo"}


def test_help_imports_nothing_heavy():
    code = "import sys; from kvsurgeon.cli.main import run; run(['--help']); print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = shown.splitlines()[-1]
    heavy = ("onnx", "onnx_ir", "numpy", "sympy", "onnxruntime")
    assert [name for name in heavy if f"'{name}'" in loaded] == []


def test_without_a_command_help_is_printed(shell):
    code, out, _ = shell()
    assert (code, "Usage: kvsurgeon" in out) == (2, True)


def test_the_version_is_printed(shell):
    assert shell("--version") == (0, "kvsurgeon 0.1.0\n", "")
    assert kvsurgeon.__version__ == "0.1.0"


def test_the_package_runs_as_a_module(shell):
    command = [sys.executable, "-m", "kvsurgeon", "-h"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == shell("--help")[1]


def test_the_help_of_a_pass_is_its_docstring_and_its_fields(shell, site):
    install("sample", site)
    code, out, _ = shell("annotate", "--help")
    words = " ".join(out.split())
    assert code == 0
    assert "Add a note to the metadata of nodes." in words
    for part in ("--note", "The text.", "--operators TEXT,...", "The operators of these nodes. [default: MatMul]"):
        assert part in words
    assert "Attributes" not in words


# Usage errors and unreadable models


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing"], 2, "No such command"),
        (["inject", "{given}"], 2, "--output"),
        (["inject"], 2, "MODEL"),
        (["inject", "{given}", "-o", "{out}", "--color", "x"], 2, "--color"),
        (["run", "{given}", "-p", "inject{{color=red}}", "-o", "{out}"], 2, "no option color"),
        (["run", "{given}", "-p", "nothing", "-o", "{out}"], 2, "unknown pass 'nothing'"),
        (["inject", "{given}/missing", "-o", "{out}"], 4, "missing"),
        (["inspect", "{given}/config.json"], 4, "config.json"),
        (["verify", "{given}", "{given}/missing"], 4, "missing"),
        (["inject", "{given}", "-o", ""], 2, "an empty one"),
        (["verify", "{given}", "{given}", "--seed", "-1"], 2, "seed"),
        (["generate", "{given}", "--prompt", "1", "--temperature", "1", "--seed", "-1"], 2, "seed"),
        (["generate", "{given}", "--prompt", "x"], 2, "tokenizer"),
        (["generate", "{given}"], 2, "one of --prompt and --prompts"),
        (["generate", "{given}", "--prompts", "missing.txt"], 4, "text file of prompts"),
        (["generate", "{given}", "--prompt", "x", "--temperature", "-1"], 2, "temperature"),
    ],
)
def test_an_error_is_one_line_with_its_code(shell, models, tmp_path, arguments, code, words):
    names = {"given": models / "given", "out": tmp_path / "out"}
    found, out, err = shell(*(argument.format(**names) for argument in arguments))
    assert found == code
    assert (out, err.count("\n"), err.startswith("kvsurgeon: error: "), words in err) == ("", 1, True, True)
    assert re.search(rf" \[KVS-{code}\d\d\]$", err)
    assert list(tmp_path.iterdir()) == []


def test_an_internal_error_is_one_line_and_debug_prints_the_traceback(shell, models, monkeypatch):
    def fail(*args, **kwargs):
        raise IndexError("list index\nout of range")

    monkeypatch.setattr(Subject, "of", fail)
    code, _, err = shell("inspect", models / "given")
    message = (
        "kvsurgeon: internal error: IndexError: list index out of range; this is a mistake of kvsurgeon, please report "
        "it with the model and the traceback that --debug prints [KVS-501]\n"
    )
    assert (code, err) == (5, message)
    code, _, err = shell("inspect", models / "given", "--debug")
    assert (code, err.startswith("Traceback"), err.splitlines()[-1]) == (5, True, message.strip())


@pytest.mark.parametrize("command", ["inspect", "inject"])
def test_a_mistake_in_a_rule_is_not_a_refusal(shell, models, tmp_path, monkeypatch, command):
    def rule(call):
        return undefined_name  # noqa: F821

    monkeypatch.setattr(shape_inference, "find", lambda *key: Operator(op_type="Add", shape=rule))
    code, _, err = shell(command, models / "given", *(["-o", tmp_path / "out"] if command == "inject" else []))
    assert (code, "NameError: name 'undefined_name' is not defined; this is a mistake" in err) == (5, True)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_prints_nothing(shell, models, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Subject, "of", stop)
    assert shell("inspect", models / "given") == (130, "", "")


def test_an_interrupted_process_prints_nothing():
    hangs = "lambda path: os.kill(os.getpid(), signal.SIGINT) or time.sleep(9)"
    heard = (
        "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell lets what is in the background ignore it
    )
    code = (
        f"import os, signal, time; from kvsurgeon.passes.contract import Subject; {heard}; Subject.of = {hangs}; {MAIN}"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", "x"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_closed_pipe_prints_nothing():
    with subprocess_of("--help") as process:
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "")


# Passes


def test_inject_verifies_and_writes_the_model_with_its_files(shell, models, tmp_path):
    code, out, err = shell("inject", models / "given", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "verified: largest error" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.onnx", "model.data", "config.json"}
    assert shell("verify", models / "given", tmp_path / "out")[0] == 0


def test_weights_are_linked_or_copied(shell, models, tmp_path):
    for name, options, linked in (("copied", (), False), ("linked", ("--link-weights",), True)):
        assert shell("inject", models / "given", "-o", tmp_path / name, "--no-verify", *options)[0] == 0
        assert (tmp_path / name / "model.data").samefile(models / "given" / "model.data") == linked


def test_inject_prints_json(shell, models, tmp_path):
    code, out, _ = shell("inject", models / "given", "-o", tmp_path / "out" / "cached.onnx", "--json")
    facts = json.loads(out)
    assert (code, facts["output"]) == (0, str(tmp_path / "out" / "cached.onnx"))
    assert facts["verification"]["ok"] is True
    assert facts["steps"][0]["pass"] == "inject"


def test_no_verify_is_reported(shell, models, tmp_path):
    code, out, _ = shell("inject", models / "given", "-o", tmp_path / "out", "--no-verify")
    assert (code, "not verified" in out) == (0, True)


def test_the_output_may_be_the_input(shell, tmp_path):
    onnx.save(Decoder(Config()).model(), tmp_path / "model.onnx")
    assert shell("inject", tmp_path, "-o", tmp_path)[0] == 0
    assert "past_key_values.0.key" in [value.name for value in onnx.load(tmp_path / "model.onnx").graph.input]
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_cache_names_are_options(shell, models, tmp_path):
    options = ("-p", "inject{past=cache.{layer}.{kind}}", "-o", tmp_path / "out")
    assert shell("run", models / "given", *options)[0] == 0
    names = [value.name for value in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.input]
    assert "cache.2.value" in names


def test_inspect_shows_a_cache(shell, models, tmp_path):
    assert shell("inject", models / "given", "-o", tmp_path / "cached", "--no-verify")[0] == 0
    code, out, _ = shell("inspect", tmp_path / "cached")
    assert code == 0
    assert "dynamic, by Concat: past `past_key_values.0.key`, present `present.0.key`" in " ".join(out.split())


def test_inspect_shows_the_layers(shell, models):
    code, out, _ = shell("inspect", models / "given")
    assert (code, "3 layers" in out) == (0, True)
    facts = json.loads(shell("inspect", models / "given", "--json")[1])
    heads = {(one["query_heads"], one["kv_heads"], one["head_dim"]) for one in facts["attentions"]}
    assert heads == {(4, 2, 8)}


# Passes of installed packages


def test_passes_lists_all_passes_and_their_errors(shell, site):
    for package in ("sample", "troubled"):
        install(package, site)
    code, out, _ = shell("passes")
    assert (code, "ModuleNotFoundError" in out, "sample-passes 1.2" in out) == (0, True, True)
    facts = {one["name"]: one for one in json.loads(shell("passes", "--json")[1])}
    assert set(facts) >= {*registry.BUILT_IN, "annotate", "swap-addends", "missing", "raises"}
    assert facts["swap-addends"]["options"] == [
        {"name": "limit", "type": "int", "required": False, "default": 1000, "help": ""}
    ]
    assert "troubled-passes 0.1" in facts["missing"]["error"]


def test_a_plugin_is_a_command(shell, site, models, tmp_path):
    install("sample", site)
    options = ("--note", "checked", "--operators", "Add,Mul", "-o", tmp_path / "out")
    code, out, err = shell("annotate", models / "given", *options)
    assert (code, err) == (0, "")
    assert "verified: largest error" in out
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    noted = {node.op_type for node in model.graph.node if [one.value for one in node.metadata_props] == ["checked"]}
    assert noted == {"Add", "Mul"}


def test_plugins_of_both_kinds_run_in_a_pipeline_with_inject(shell, site, models, tmp_path):
    install("sample", site)
    pipeline = "annotate{note=before, operators=MatMul,Add},inject,swap-addends{limit=2}"
    trace = tmp_path / "trace"
    options = ("-p", pipeline, "-o", tmp_path / "out", "--verify-each", "--trace", trace)
    code, _, err = shell("run", models / "given", *options)
    assert (code, err) == (0, "")
    assert shell("verify", models / "given", tmp_path / "out")[0] == 0
    before = onnx.load(models / "given" / "model.onnx", load_external_data=False)
    after = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    products = [node for node in after.graph.node if node.op_type == "MatMul"]
    assert len(products) == sum(node.op_type == "MatMul" for node in before.graph.node)
    assert {one.value for node in products for one in node.metadata_props} == {"before"}
    texts = {file.name: file.read_text("utf-8") for file in trace.iterdir()}
    assert {name: "past_key_values" in text for name, text in texts.items()} == {
        "00-original.txt": False,
        "01-annotate.txt": False,
        "02-inject.txt": True,
        "03-swap-addends.txt": True,
    }


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "gpt2_torchscript_sdpa"])
def test_plugins_of_both_kinds_run_with_inject_on_a_real_export(shell, site, tmp_path, name):
    install("sample", site)
    source = Path(__file__).parents[1] / "corpus" / f"{name}.onnx"
    pipeline = "annotate{note=before, operators=MatMul},inject,swap-addends{limit=2}"
    code, _, err = shell("run", source, "-p", pipeline, "-o", tmp_path / "out.onnx", "--verify-each")
    assert (code, err) == (0, "")
    before, after = onnx.load(source), onnx.load(tmp_path / "out.onnx")
    noted = {one.value for node in after.graph.node if node.op_type == "MatMul" for one in node.metadata_props}
    assert "before" in noted
    weights = {tensor.name: tensor.SerializeToString() for tensor in after.graph.initializer}
    large = [tensor for tensor in before.graph.initializer if len(tensor.raw_data) > 600]
    assert large
    assert all(weights[tensor.name] == tensor.SerializeToString() for tensor in large)
    untouched = {node.SerializeToString() for node in after.graph.node}
    assert sum(node.SerializeToString() in untouched for node in before.graph.node) > 0.3 * len(untouched)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("raises", 3, "pass raises raised ZeroDivisionError: no"),
        ("breaks", 3, "pass breaks left an invalid graph: graph output `logits`"),
        ("says-nothing", 3, "pass says-nothing: expected it to return Changed or Unchanged"),
        ("differs", 1, "the results of the model differ from those of the original"),
        ("idle", 3, "the model is unchanged: idle: the function did not change the graph"),
        ("missing", 2, "pass missing of troubled-passes 0.1"),
        ("unannotated", 2, "pass unannotated"),
    ],
)
@pytest.mark.parametrize("command", ["pass", "run"])
def test_an_error_names_the_plugin_and_nothing_is_written(shell, site, models, tmp_path, name, code, words, command):
    install("troubled", site)
    arguments = [name] if command == "pass" else ["run", "-p", name]
    found, out, err = shell(*arguments, models / "given", "-o", tmp_path / "out")
    assert (found, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_name_conflict_is_an_error_of_that_command_only(shell, site, models, tmp_path):
    install("clashing", site)
    for command in (["inject"], ["run", "-p", "inject"]):
        code, _, err = shell(*command, models / "given", "-o", tmp_path / "out")
        assert (code, "clashing-passes 3" in err, "kvsurgeon.passes.cache.inject:Inject" in err) == (2, True, True)
    assert shell("verify", models / "given", models / "cached")[0] == 0
    assert not (tmp_path / "out").exists()


def test_output_of_a_pass_goes_to_stderr(shell, site, models, tmp_path):
    install("sample", site)
    (site / "sample_passes" / "swap.py").write_text(
        "import onnx_ir as ir\n"
        "def swap_addends(model: ir.Model) -> None:\n"
        "    print('hello')\n"
        "    model.graph.name = 'x'\n"
    )
    code, out, err = shell("swap-addends", models / "given", "-o", tmp_path / "out", "--json")
    assert (code, err) == (0, "hello\n")
    assert json.loads(out)["verified"] is True


def test_an_option_may_not_have_the_name_of_a_shared_option(shell, site, models, tmp_path):
    install("sample", site)
    (site / "sample_passes" / "swap.py").write_text(
        "import onnx_ir as ir\ndef swap_addends(model: ir.Model, output: int = 1) -> None: ..."
    )
    code, _, err = shell("swap-addends", models / "given", "-o", tmp_path / "out")
    assert (code, "its option output has the name of a shared option" in err) == (2, True)


def test_a_trace_folder_that_cannot_be_created_is_an_error(shell, models, tmp_path):
    (tmp_path / "file").touch()
    options = ("-p", "inject", "-o", tmp_path / "out", "--trace", tmp_path / "file" / "trace")
    code, _, err = shell("run", models / "given", *options)
    assert (code, "cannot write to" in err, (tmp_path / "out").exists()) == (2, True, False)


# Generation


def test_generate_continues_the_lines_of_a_file(shell, tmp_path):
    model = Decoder(Config(layers=2, head_dim=16)).model()
    passes = Inject(cache="static", past_length="mask"), FuseAttention(padding="lengths")
    onnx.save(after(model, *passes), tmp_path / "model.onnx")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1,2,3\n\n5\n8,9\n", "utf-8")
    code, out, err = shell("generate", tmp_path, "--prompts", prompts, "--rows", 2, "--max-new-tokens", 3)
    assert code == 0
    assert err.startswith("9 tokens of 3 prompts, ")
    alone = {place: shell("generate", tmp_path, "--prompt", text, "--max-new-tokens", 3)[1].split()
             for place, text in (("1:", "1,2,3"), ("2:", "5"), ("3:", "8,9"))}  # fmt: skip
    assert {line.split()[0]: line.split()[1:] for line in out.splitlines()} == alone


def test_generate_prints_the_text_and_its_speed(shell, models, tmp_path):
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(61)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    said = {}
    for name in ("given", "cached"):
        shutil.copytree(models / name, tmp_path / name)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        code, out, err = shell("generate", tmp_path / name, "--prompt", "w1 w2", "--max-new-tokens", 8)
        assert code == 0
        said[name] = out.split(), re.sub(r"[\d.]+ tokens/s", "N tokens/s", err)
    assert said["given"] == (said["cached"][0], "8 tokens without a cache, N tokens/s\n")
    assert said["cached"][1] == "8 tokens with a cache, N tokens/s\n"
    _, out, err = shell("generate", tmp_path / "cached", "--prompt", "w1 w2", "--max-new-tokens", 8, "--no-cache")
    assert (out.split(), "without a cache" in err) == (said["given"][0], True)
    _, out, _ = shell("generate", tmp_path / "cached", "--prompt", "1,2", "--max-new-tokens", 8, "--ids")
    assert [f"w{token}" for token in out.split()] == said["given"][0]


# Options in files, and passes of files

PASS = """
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.passes.contract import Changed, Outcome, Subject


@dataclass(frozen=True, kw_only=True)
class RenameLogits:
    \"\"\"Rename the first output.\"\"\"

    name: ClassVar[str] = "rename-logits"
    to: str = "scores"
    stated: bool = True

    def apply(self, subject: Subject) -> Outcome:
        output = subject.model.graph.outputs[0]
        old, output.name = output.name, self.to
        return Changed(edits=1, renamed={old: self.to} if self.stated else {})


def label(model: ir.Model, text: str = "x") -> None:
    \"\"\"Label the model.\"\"\"
    model.doc_string = text


def _helper(number):
    return number
"""


@pytest.fixture
def pass_file(tmp_path):
    file = tmp_path / "my_pass.py"
    file.write_text(PASS)
    return file


def test_passes_of_a_file_run_and_are_described(shell, models, tmp_path, pass_file):
    pipeline = "label{text=y},inject,rename-logits{to=y}"
    code, out, err = shell("run", models / "given", "--load", pass_file, "-p", pipeline, "-o", tmp_path / "out.onnx")
    assert (code, err, "verified: largest error" in out) == (0, "", True)
    assert onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.output[0].name == "y"
    code, out, _ = shell("passes", "rename-logits", "--load", pass_file)
    assert (code, "Rename the first output." in out, "true|false" in out) == (0, True, True)
    assert {"label", "rename-logits"} <= {
        line.split()[0] for line in shell("passes", "--load", pass_file)[1].splitlines()
    }


def test_outputs_that_a_pass_renames_without_saying_so_differ(shell, models, tmp_path, pass_file):
    options = ("--load", pass_file, "-p", "rename-logits{stated=false}", "-o", tmp_path / "out.onnx")
    code, _, err = shell("run", models / "given", *options)
    assert (code, "lacks the output" in err, (tmp_path / "out.onnx").exists()) == (1, True, False)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("def f(x):\n    return x\n", 2, "expected a pass"),
        ("import nothing_at_all\n", 2, "nothing_at_all"),
        ("raise SystemExit(0)\n", 2, "SystemExit"),
        (None, 4, "expected a Python file"),
        (PASS.replace("rename-logits", "inject"), 2, "two passes are called inject"),
    ],
)
def test_a_file_without_passes_is_an_error(shell, models, tmp_path, text, code, words):
    file = tmp_path / "other.py"
    if text is not None:
        file.write_text(text)
    found, out, err = shell("run", models / "given", "--load", file, "-p", "inject", "-o", tmp_path / "out.onnx")
    assert (found, out, err.count("\n"), words in err) == (code, "", 1, True)


def test_options_are_saved_to_a_file_and_read_from_it(shell, models, tmp_path, pass_file):
    saved, again = tmp_path / "saved.yaml", tmp_path / "again.yaml"
    options = ("--load", pass_file, "-p", 'label{text="a,b=c"},inject', "--effort", "quick", "--seed", 3)
    assert shell("run", models / "given", *options, "-o", tmp_path / "a.onnx", "--save-config", saved)[0] == 0
    options = ("-o", tmp_path / "b.onnx", "--config", saved, "--save-config", again)
    assert shell("run", models / "given", *options)[0] == 0
    assert sorted(saved.read_text().splitlines()) == sorted(again.read_text().splitlines())
    assert onnx.load(tmp_path / "b.onnx", load_external_data=False).doc_string == "a,b=c"


def test_passes_of_repeated_options_run_in_order(shell, models, tmp_path):
    code, out, _ = shell(
        "run", models / "given", "-p", "inject", "-p", "expand-gqa", "-o", tmp_path, "--no-verify", "--json"
    )
    assert code == 0
    assert [one["pass"] for one in json.loads(out)["steps"]] == ["inject", "expand-gqa"]


def test_a_pipeline_in_a_file_is_a_list_of_passes(shell, models, tmp_path, pass_file):
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"""
        pipeline: [{{label: {{text: "a,b=c"}}}}, inject: {{key-layout: [kv_heads, batch, sequence, head_dim]}}]
        load: {pass_file}
        verify: false
    """)
    options = ("--config", file, "-o", tmp_path / "out.onnx", "--json")
    code, out, _ = shell("run", models / "given", *options)
    assert (code, json.loads(out)["verified"]) == (0, False)
    model = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert model.doc_string == "a,b=c"
    (past,) = [value for value in model.graph.input if value.name == "past_key_values.0.key"]
    assert past.type.tensor_type.shape.dim[1].dim_param == "batch_size"


def test_a_shell_completes_commands_options_and_names(shell, monkeypatch):
    monkeypatch.setenv("_KVSURGEON_COMPLETE", "complete_bash")
    for words, expected in {"inj": "inject", "inject --eff": "--effort", "targets qn": "qnn"}.items():
        monkeypatch.setenv("COMP_WORDS", f"kvsurgeon {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        assert shell() == (0, f"{expected}\n", "")


# Verification


def test_the_exit_code_of_verify_is_the_verdict(shell, models, tmp_path):
    assert shell("verify", models / "given", models / "cached")[0] == 0
    other = CachedDecoder(Config(seed=1)).model()
    onnx.save(other, tmp_path / "other.onnx")
    code, out, err = shell("verify", models / "given", tmp_path / "other.onnx")
    assert (code, err, "different: largest error" in out) == (1, "", True)
    code, out, _ = shell("verify", models / "given", tmp_path / "other.onnx", "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_a_certificate_is_written_and_confirmed_by_commands(shell, models, tmp_path):
    file, out = tmp_path / "c.json", tmp_path / "out"
    code, printed, _ = shell("inject", models / "given", "-o", out, "--effort", "quick", "--certificate", file)
    assert (code, f"certificate {file}" in printed) == (0, True)
    code, printed, err = shell("verify", out, "--certificate", file)
    assert (code, err) == (0, "")
    assert "confirmed" in printed
    assert "causal: measured" in printed
    code, printed, _ = shell("verify", models / "given", out, "--certificate", file, "--json")
    assert (code, json.loads(printed)["confirmed"]) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["verify", "{out}", "--certificate", "{file}"], 104),
        (["verify", "{given}", "{given}", "--certificate", "{file}"], 104),
        (["verify", "{out}", "--certificate", "{given}/config.json"], 404),
        (["verify", "{out}", "--certificate", "{given}/missing.json"], 401),
        (["verify", "{out}", "--certificate", "{file}", "--seed", "1"], 201),
        (["verify", "{out}"], 201),
        (["inject", "{given}", "-o", "{out}", "--certificate", "{file}", "--no-verify"], 201),
        (["inject", "{given}", "-o", "{out}", "--certificate", "{given}/config.json"], 201),
        (["inject", "{given}", "-o", "{out}", "--certificate", "{file}", "--target", "genai"], 201),
    ],
)
def test_what_is_not_confirmed_or_certified_has_a_code(shell, models, tmp_path, arguments, code):
    names = {"given": models / "given", "out": tmp_path / "out", "file": tmp_path / "c.json"}
    shell("inject", names["given"], "-o", names["out"], "--effort", "quick", "--certificate", names["file"])
    with (names["out"] / "model.onnx").open("ab") as file:
        file.write(b"\0")
    found, out, err = shell(*(argument.format(**names) for argument in arguments))
    assert (found, out, err.count("\n")) == (code // 100, "", 1)
    assert err.endswith(f" [KVS-{code}]\n")
