"""Plausible mistakes, in a shell and in Python: each is one clear line, with the exit code of its kind."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder

import kvsurgeon
from kvsurgeon.cli.main import run
from kvsurgeon.passes.cache.inject import Inject

# command, exit code, words of the message; {m} is a model, {c} one with a cache, {d} a folder of other files
SHELL = [
    ("injct {m} -o {o}", 2, "Did you mean 'inject'"),
    ("inspct {m}", 2, "Did you mean 'inspect'"),
    ("inject", 2, "MODEL"),
    ("inject {m}", 2, "--output"),
    ("inject {m} {m} -o {o}", 2, "unexpected extra argument"),
    ("inject {m} -o {o} --efort quick", 2, "--effort"),
    ("inject {m} -o {o} --effort fast", 2, "'quick', 'normal', 'thorough'"),
    ("inject {m} -o {o} --seed -1", 2, "seed"),
    ("inject {m} -o {o} --seed abc", 2, "integer"),
    ("inject {m} -o {o} --cache statik", 2, "expected dynamic|static|new-tokens, found 'statik'"),
    ("inject {m} -o {o} --max-length 10", 2, "use fix-shapes"),
    ("inject {m} -o {o} --cache static --max-length -5", 2, "max-length"),
    ("inject {m} -o {o} --cache static --max-length ten", 2, "expected int|none, found 'ten'"),
    ("inject {m} -o {o} --past-length shapes", 2, "shape|input|per-sequence|positions|mask|none"),
    ("inject {m} -o {o} --cache static --past-length shape", 2, "expected past-length"),
    ("inject {m} -o {o} --key-layout batch,heads", 2, "key-layout"),
    ("inject {m} -o {o} --key-layout batch,batch,sequence,head_dim", 2, "found batch, batch"),
    ("inject {m} -o {o} --past cache", 2, "contain {layer} and {kind}"),
    ("inject {m} -o {o} --past cache.{{layers}}.{{kind}}", 2, "layers"),
    ("inject {m} -o {o} --cache-dtype float8", 2, "float16|none"),
    ("inject {m} -o {o} --input nothing=new", 2, "nothing"),
    ("inject {m} -o {o} --input attention_mask=newest", 2, "newest"),
    ("inject {m} -o {o} --target genay", 2, "did you mean genai"),
    ("inject {m} -o {o}.onnx --target genai", 2, "expected a folder"),
    ("inject {m}/missing -o {o}", 4, "check the path"),
    ("inject {d} -o {o}", 4, "found 2: cut.onnx, empty.onnx; give the path of one"),
    ("inject {d}/text.txt -o {o}", 4, "is a text file"),
    ("inject {d}/empty.onnx -o {o}", 4, "empty file"),
    ("inject {d}/cut.onnx -o {o}", 4, "truncated or damaged"),
    ("inject '' -o {o}", 2, "an empty one"),
    ("inject {m} -o {d}/text.txt/out", 2, "text.txt"),
    ("inject {c} -o {o}", 3, "already has a cache"),
    ("inject {m} -o {o} --no-verify --certificate {o}", 2, "verification is skipped"),
    ("inject {m} -o {o} --target genai --certificate {o}", 2, "certificate"),
    ("inject {m} -o {o} --config {d}/missing.yaml", 4, "expected a YAML file"),
    ("inject {m} -o {o} --config {d}/list.yaml", 2, "expected options such as"),
    ("inject {m} -o {o} --config {d}/typo.yaml", 2, "did you mean effort"),
    ("inject {m} -o {o} --save-config {d}/none/x.yaml", 2, "folder"),
    ("run {m} -o {o}", 2, "--pipeline"),
    ("run {m} -o {o} -p ''", 2, "an empty one"),
    ("run {m} -o {o} -p injct", 2, "did you mean inject?"),
    ("run {m} -o {o} -p inject,", 2, "expected passes such as"),
    ("run {m} -o {o} -p 'inject{{'", 2, "expected passes such as"),
    ("run {m} -o {o} -p 'inject{{cash=static}}'", 2, "did you mean cache"),
    ("run {m} -o {o} -p 'inject{{cache=statik}}'", 2, "found 'statik'"),
    ("run {m} -o {o} -p 'inject{{static}}'", 2, "expected option=value"),
    ("run {m} -o {o} -p 'inject{{cache=static,cache=dynamic}}'", 2, "given twice"),
    ("run {m} -o {o} -p 'remove-mask{{x=1}}'", 2, "it has none"),
    ("run {m} -o {o} -p fix-shapes", 2, "requires tokens"),
    ("run {m} -o {o} -p remove-cache --no-verify", 3, "the model is unchanged"),
    ("run {m} -o {o} -p inject --load {d}/missing.py", 4, "expected a Python file"),
    ("run {m} -o {o} -p inject --load {d}/text.txt", 2, "suffix .py"),
    ("passes injct", 2, "did you mean inject?"),
    ("targets openvno", 2, "did you mean openvino?"),
    ("inspect", 2, "MODEL"),
    ("inspect {m} --target x", 2, "expected one of optimum"),
    ("verify {m}", 2, "found one model"),
    ("verify {m} {m}/missing", 4, "missing"),
    ("verify {m} {d}/text.txt", 4, "text.txt"),
    ("verify {m} {m} --effort fast", 2, "quick"),
    ("verify {m} {m} --seed -1", 2, "seed"),
    ("verify {m} --certificate {d}/missing.json", 4, "missing.json"),
    ("verify {m} --certificate {d}/missing.json --loss", 2, "omit"),
    ("generate {m}", 2, "one of --prompt and --prompts"),
    ("generate {m} --prompt 1 --prompts {d}/text.txt", 2, "found both"),
    ("generate {m} --prompts {d}/missing.txt", 4, "text file of prompts"),
    ("generate {m} --prompt hello", 2, "tokenizer.json"),
    ("generate {m} --prompt 1 --max-new-tokens 0", 2, "max-new-tokens"),
    ("generate {m} --prompt 1 --temperature -1", 2, "temperature"),
    ("generate {m} --prompt 1 --temperature 1 --top-p 2", 2, "top_p"),
    ("generate {m} --prompt 1 --temperature 1 --top-k -1", 2, "top_k"),
    ("generate {m} --chat --prompts {d}/text.txt", 2, "expected --chat with --prompt"),
    ("generate {m} --chat --prompt hello", 2, "chat template"),
    ("generate {m} --ids --prompt hello", 2, "token IDs such as 1,2,3"),
    ("generate {m} --ids --chat --prompt 1", 2, "found --ids"),
    ("generate {m} --prompt 1 --provider cpux", 2, "did you mean cpu"),
    ("verify {m} {m} --provider cpu{{a}}", 2, "expected a provider such as"),
    ("plot {m} --layer 9 --prompt 1", 2, "layer"),
    ("plot {m} --prompt 1 -o {o}.nothing", 2, "nothing"),
    ("retarget {m} -o {o}", 3, "use inject"),
    ("replicate-kv-heads {m} -o {o}", 2, "--repeat"),
    ("replicate-kv-heads {m} -o {o} --repeat 0", 2, "expected one of 2, 4 KV heads, found 0"),
    ("replicate-kv-heads {m} -o {o} --kv-heads 3", 2, "expected one of"),
    ("rename-io {m} -o {o} --names logits", 2, "old:new"),
    ("rename-io {m} -o {o} --names logits:input_ids", 3, "already has"),
    ("lower-opset {m} -o {o} --opset 99", 2, "opset"),
    ("inject {m} -o {o} --bits 4", 2, "an option of quantize-cache"),
    ("inject {m} -o {o} --save-config {m}/model.onnx", 2, "suffix .yaml or .yml"),
    ("report {m} -o {m}/model.onnx", 2, "suffix .html or .htm"),
    ("report {m} -o {d}/none/report.html", 2, "expected a folder that is writable"),
    ("demo --export-only -o {m}", 2, "expected no other model"),
    ("generate {m} --ids --prompt 1,-2", 2, "found '1,-2'"),
    ("generate {m} --prompt \udcff", 2, "found other bytes"),
    ("generate {m} --prompt 1 --temperature inf", 2, "temperature"),
    ("generate {m} --prompt 1 --top-k 5", 2, "expected a temperature above 0"),
    ("quantize-cache {m} -o {o} --bits 8", 3, "the model has no cache: use inject"),
    ("quantize-cache {c} -o {o} --bits 3", 2, "expected 8|4"),
    ("merge-kv-heads {m} -o {o} --kv-heads 2 --max-loss nan", 2, "max-loss"),
    ("merge-kv-heads {m} -o {o} --kv-heads 1 --text {d}/none.txt", 4, "none.txt"),
    ("window-cache {c} -o {o} --window -3", 2, "from 1"),
    ("window-cache {c} -o {o} --window 1e3", 2, "found '1e3'"),
    ("share-kv-layers {m} -o {o}", 2, "--kv-layers and --map"),
    ("run {m} -o {o} -p inject --load {d}", 4, "expected a Python file"),
    ("run {m} -o {o} -p inject;fuse-attention", 2, "expected passes such as"),
    ("run {m} -o {o} -p inject,quantize-cache --no-verify --max-loss 1", 2, "the loss would not be measured"),
    ("inspect 'C:\\models\\model.onnx'", 4, "check the path"),
    ("inject {m} -o {m}/model.onnx/out", 2, "cannot write"),
    ("inject {m} -o /dev/null", 2, "expected an .onnx file or a folder"),
    ("inject {m} -o {o} --config {m}/model.onnx", 4, "expected a YAML file"),
    ("verify {m} {c} --certificate {d}", 4, "expected a regular file"),
    ("generate {m} --prompts {m}/model.onnx", 4, "text file of prompts"),
]

PYTHON = [
    (lambda m, d: kvsurgeon.inspect(None), "UsageError", "found NoneType"),
    (lambda m, d: kvsurgeon.inspect({}), "UsageError", "expected a model: a path, bytes"),
    (lambda m, d: kvsurgeon.inspect(b""), "InvalidModelError", "expected a model with a graph, found none"),
    (lambda m, d: kvsurgeon.inspect(b"hello"), "InvalidModelError", "not an ONNX model"),
    (lambda m, d: kvsurgeon.inspect(d / "missing"), "InputError", "check the path"),
    (lambda m, d: kvsurgeon.load(d / "text.txt"), "InvalidModelError", "text file"),
    (lambda m, d: kvsurgeon.save(m, d / "text.txt" / "x.onnx"), "UsageError", "text.txt"),
    (lambda m, d: kvsurgeon.inject(m, color="red"), "UsageError", "no option color"),
    (lambda m, d: kvsurgeon.inject(m, max_lenght=5), "UsageError", "did you mean max-length"),
    (lambda m, d: kvsurgeon.inject(m, cache="statik"), "UsageError", "expected dynamic|static|new-tokens"),
    (lambda m, d: kvsurgeon.inject(m, cache="static", max_length="10"), "UsageError", "expected int|none, found '10'"),
    (lambda m, d: kvsurgeon.inject(m, key_layout=["batch"]), "UsageError", "key-layout"),
    (lambda m, d: kvsurgeon.inject(m, target="genay"), "UsageError", "did you mean genai"),
    (lambda m, d: kvsurgeon.inject(m, effort="fast"), "UsageError", "quick"),
    (lambda m, d: kvsurgeon.inject(m, seed=-1), "UsageError", "seed"),
    (lambda m, d: kvsurgeon.run(m, "injct"), "UsageError", "did you mean inject?"),
    (lambda m, d: kvsurgeon.run(m, Inject), "UsageError", "call the class of a pass"),
    (lambda m, d: kvsurgeon.run(m, [], verify=False), "UnsupportedError", "the pipeline is empty"),
    (lambda m, d: kvsurgeon.run(m, 3), "UsageError", "expected a pass or a function, found 3"),
    (lambda m, d: kvsurgeon.run(m, "inject", effrt="quick"), "UsageError", "did you mean effort?"),
    (lambda m, d: kvsurgeon.retarget(m, verify=False), "UnsupportedError", "use inject"),
    (lambda m, d: kvsurgeon.remove_cache(m, verify=False), "UnsupportedError", "unchanged"),
    (lambda m, d: kvsurgeon.verify(m, m, effort="fast"), "UsageError", "quick"),
    (lambda m, d: kvsurgeon.verify(m, 3), "UsageError", "found int"),
    (lambda m, d: kvsurgeon.verify(m, m, seed=-1), "UsageError", "seed"),
    (lambda m, d: kvsurgeon.generate(m, ""), "UsageError", "token IDs"),
    (lambda m, d: kvsurgeon.generate(m, []), "UsageError", "prompt"),
    (lambda m, d: kvsurgeon.generate(m, "hello"), "UsageError", "tokenizer.json"),
    (lambda m, d: kvsurgeon.generate(m, [1], max_new_tokens=0), "UsageError", "max_new_tokens"),
    (lambda m, d: kvsurgeon.generate(m, [10**6]), "KvsurgeonError", ""),
    (lambda m, d: kvsurgeon.Sampling(temperature=-1), "UsageError", "temperature"),
    (lambda m, d: kvsurgeon.Sampling(top_p=0.5), "UsageError", "temperature above 0"),
    (lambda m, d: kvsurgeon.report(m, m / "model.onnx"), "UsageError", "suffix .html or .htm"),
    (lambda m, d: kvsurgeon.plot(m, layer=-1, prompt=[1]), "UsageError", "layer"),
    (lambda m, d: kvsurgeon.confirm(d / "missing.json", m), "KvsurgeonError", "missing.json"),
    (lambda m, d: kvsurgeon.KeyValueCacheInjector(hidden_size=8), "UsageError", "did you mean hidden_size_dim"),
    (lambda m, d: kvsurgeon.KeyValueCacheInjector().apply(d / "missing"), "InputError", "check the path"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    names = {"m": folder / "model", "c": folder / "cached", "d": folder / "other"}
    for path in names.values():
        path.mkdir()
    onnx.save(Decoder(Config(layers=1)).model(), names["m"] / "model.onnx")
    onnx.save(CachedDecoder(Config(layers=1)).model(), names["c"] / "model.onnx")
    whole = (names["m"] / "model.onnx").read_bytes()
    for name, content in {"text.txt": b"hello\n", "empty.onnx": b"", "cut.onnx": whole[: len(whole) // 2]}.items():
        (names["d"] / name).write_bytes(content)
    for name, text in {"list.yaml": "- 1\n", "typo.yaml": "efort: quick\n"}.items():
        (names["d"] / name).write_text(text)
    return names


@pytest.mark.parametrize(("command", "code", "words"), SHELL, ids=[command for command, _, _ in SHELL])
def test_a_mistake_in_a_shell_is_one_line_with_its_code(command, code, words, places, tmp_path, capsys):
    found = run(shlex.split(command.format(**places, o=tmp_path / "out")))
    out, err = capsys.readouterr()
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert words in err
    assert re.search(rf" \[KVS-{code}\d\d\]$", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "code", "words"), [(">&-", 0, ""), (">/dev/full", 2, "cannot write to stdout")]
)
def test_stdout_that_takes_nothing(redirection, code, words, places):
    command = f"{shlex.quote(sys.executable)} -m kvsurgeon inspect {places['m']} --json {redirection}"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr.count("\n")) == (code, bool(words)), found.stderr
    assert words in found.stderr


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_a_mistake_in_python_is_an_error_of_the_package(number, places):
    call, kind, words = PYTHON[number]
    with pytest.raises(getattr(kvsurgeon, kind)) as caught:
        call(places["m"], places["d"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
