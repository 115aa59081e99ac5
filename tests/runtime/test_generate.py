"""Text generation: greedy and sampled, one prompt and several, up to a stop token."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import kvsurgeon
from kvsurgeon.api import generate
from kvsurgeon.errors import InputError, UsageError
from kvsurgeon.runtime import Sampling, TextGenerator
from kvsurgeon.runtime.text import text_decoder

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def words():
    """A tokenizer of 61 words w0, w1, ..., one for each token."""
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(61)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture
def folder(tmp_path, words):
    onnx.save(CachedDecoder().model(), tmp_path / "model.onnx")
    words.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def greedy(count, **options):
    return generate(CachedDecoder().model(), PROMPT, max_new_tokens=count, threads=1, **options)


def test_continues_a_text(folder):
    said = generate(folder, "w3 w1 w4 w1 w5", max_new_tokens=6, threads=1)

    assert said.tokens == greedy(6).tokens
    assert said.texts == (" ".join(f"w{token}" for token in said.tokens[0]),)
    assert (said.prompt_length, said.finish) == (5, ("length",))


def test_streams_tokens(folder):
    streamed = []
    said = generate(folder, ["w3 w1", "w4"], max_new_tokens=3, threads=1, on_token=streamed.append)

    assert [token.row for token in streamed] == [0, 1, 0, 1, 0, 1]
    assert "".join(token.text for token in streamed if token.row == 1) == said.texts[1]
    assert [token.finish for token in streamed] == [None] * 4 + ["length"] * 2


def test_measures_the_time_per_token(folder):
    said = generate(folder, [[3], [4]], max_new_tokens=5, threads=1)

    assert len(said.step_seconds) == 4
    assert said.seconds_per_token == pytest.approx(sum(said.step_seconds) / 4)
    assert said.tokens_per_second == pytest.approx(10 / (said.prefill_seconds + sum(said.step_seconds)))
    assert greedy(1).seconds_per_token > 0


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_row_ends_at_a_stop_token_and_others_continue(folder, name, as_list):
    stop = greedy(3).tokens[0][2]
    (folder / name).write_text(json.dumps({"eos_token_id": [stop] if as_list else stop}))
    said = generate(folder, [PROMPT, [9, 9]], max_new_tokens=9, threads=1)

    assert said.tokens[0] == greedy(3).tokens[0]
    assert said.finish[0] == "stop"
    assert len(said.tokens[1]) == 9 or said.tokens[1][-1] == stop


def test_an_argument_overrides_generation_config_which_overrides_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')

    assert TextGenerator(folder).stop == {7, 8}
    assert TextGenerator(folder, stop=[1]).stop == {1}


def test_ends_if_all_rows_have_stopped():
    stop = greedy(1).tokens[0][0]

    assert greedy(9, stop=[stop]).tokens == ((stop,),)


def test_side_files_may_be_in_the_folder_above(folder):
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")

    assert TextGenerator(folder / "onnx").tokenizer is not None


def test_a_batch_gives_the_same_as_its_rows():
    model = CachedDecoder(Config(position_ids=True)).model()
    prompts = [PROMPT, [9], [2, 6, 5]]
    together = generate(model, prompts, max_new_tokens=8, threads=1)

    assert together.tokens == tuple(generate(model, p, max_new_tokens=8, threads=1).tokens[0] for p in prompts)


def test_a_static_model_generates_up_to_its_length():
    said = generate(Decoder(Config(static=(1, 12))).model(), PROMPT, max_new_tokens=50, threads=1)

    assert said.tokens == (greedy(7).tokens[0],)
    assert said.finish == ("length",)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "expected a prompt, found none"),
        ([[1], []], "at least one token"),
        ("text", r"tokenizer\.json next to the model"),
    ],
)
def test_reports_a_prompt_that_cannot_be_used(prompts, message):
    with pytest.raises(UsageError, match=message):
        generate(CachedDecoder().model(), prompts)


def test_prompts_of_several_lengths_need_a_mask():
    with pytest.raises(UsageError, match="no attention mask"):
        generate(CachedDecoder(Config(attention_mask=False)).model(), [[1, 2], [3]])


def test_rejects_a_prompt_longer_than_a_static_model():
    with pytest.raises(UsageError, match="below 4 tokens"):
        generate(Decoder(Config(static=(1, 4))).model(), PROMPT)


def test_rejects_a_missing_cache():
    with pytest.raises(UsageError, match=r"past_key_values\.\*"):
        TextGenerator(Decoder().model(), cached=True)


def test_rejects_logits_of_several_codebooks():
    with pytest.raises(UsageError, match=r"logits of one token for each sequence, found \[1, 4, 61\]"):
        Sampling().choose(np.zeros((1, 4, 61)), np.random.default_rng(0))


def test_rejects_a_model_of_embeddings():
    class Embedded(Decoder):
        def declare(self):
            self.graph.input("inputs_embeds", 1, ["batch", "sequence", 32])

        def model(self):
            self.declare()
            self.graph.output(self.norm("inputs_embeds"), "logits", 1, ["batch", "sequence", 32])
            return self.graph.model("embedded")

    with pytest.raises(UsageError, match="found `inputs_embeds` only"):
        TextGenerator(Embedded().model())


@pytest.mark.parametrize(("name", "kind"), [("tokenizer.json", "a tokenizer"), ("config.json", "JSON")])
def test_names_a_broken_side_file(folder, name, kind):
    (folder / name).write_text("{")
    with pytest.raises(InputError, match=f"expected {kind}.*{name}"):
        TextGenerator(folder)


def test_ignores_a_config_that_is_no_object(folder):
    (folder / "config.json").write_text("[1]")

    assert TextGenerator(folder).stop == frozenset()


def test_decodes_a_character_of_several_tokens_once_it_is_complete():
    tokenizer = Tokenizer(models.BPE({"<0xC3>": 0, "<0xA9>": 1, "a": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    decode = text_decoder(tokenizer)

    assert [decode(token) for token in (2, 0, 1, 2)] == ["a", "", "é", "a"]


# Sampling

LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.1]]))


def drawn(sampling, times=400):
    random = np.random.default_rng(sampling.seed)
    return np.array([sampling.choose(LOGITS, random)[0] for _ in range(times)])


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(), {0}),
        (Sampling(temperature=1.0), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_k=9), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_p=0.5), {0}),
        (Sampling(temperature=1.0, top_p=0.8), {0, 1, 2}),
        (Sampling(temperature=1.0, top_k=2, top_p=0.5), {0}),
        (Sampling(temperature=1e-3), {0}),
    ],
)
def test_samples_from_the_allowed_tokens_only(sampling, possible):
    assert set(drawn(sampling).tolist()) == possible


def test_samples_by_probability():
    shares = np.bincount(drawn(Sampling(temperature=1.0), times=4000)) / 4000

    assert np.abs(shares - np.exp(LOGITS[0])).max() < 0.03


def test_a_seed_repeats_its_samples():
    same, again, other = (drawn(Sampling(temperature=1.0, seed=seed)).tolist() for seed in (1, 1, 2))

    assert same == again
    assert same != other


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": np.nan}, {"top_k": 0}, {"top_p": 0.0}])
def test_rejects_invalid_settings(wrong):
    with pytest.raises(UsageError, match="expected"):
        Sampling(**wrong)


def test_logits_are_the_same_with_and_without_a_cache(tmp_path):
    demo = Path(kvsurgeon.__file__).parent / "demo" / "model"
    path = kvsurgeon.inject(demo, tmp_path / "out", verify=False).path
    without, cached = TextGenerator(demo), TextGenerator(path)
    text = without.encode("It was late, and nobody came.")[0]
    for _ in range(2):  # the cache is emptied between texts
        expected, found = without.logits(text), cached.logits(text)
        assert expected.shape == (1, len(text), 1024)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_token_ids_are_a_prompt_without_a_tokenizer():
    model = CachedDecoder().model()
    assert generate(model, "1, 2 3", max_new_tokens=4).tokens == generate(model, [1, 2, 3], max_new_tokens=4).tokens


def test_verification_imports_no_tokenizer():
    code = "import sys, kvsurgeon.parity, kvsurgeon.runtime; print('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
