"""Text comes out: greedy and by chance, one prompt and several, and it stops where it should."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import kvsurgeon
from kvsurgeon.errors import InputError, UsageError
from kvsurgeon.runtime import Sampling, Writer, generate
from kvsurgeon.runtime.text import Reader

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


def test_text_goes_in_and_comes_out(folder):
    said = generate(folder, "w3 w1 w4 w1 w5", max_new_tokens=6, threads=1)

    assert said.tokens == greedy(6).tokens
    assert said.texts == (" ".join(f"w{token}" for token in said.tokens[0]),)
    assert (said.prompt_length, said.finish) == (5, ("length",))


def test_tokens_stream_as_they_are_made(folder):
    seen = []
    said = generate(folder, ["w3 w1", "w4"], max_new_tokens=3, threads=1, on_token=seen.append)

    assert [token.row for token in seen] == [0, 1, 0, 1, 0, 1]
    assert "".join(token.text for token in seen if token.row == 1) == said.texts[1]
    assert [token.last for token in seen] == [None] * 4 + ["length"] * 2


def test_time_is_told_per_token_and_over_all(folder):
    said = generate(folder, [[3], [4]], max_new_tokens=5, threads=1)

    assert len(said.step_seconds) == 4
    assert said.seconds_per_token == pytest.approx(sum(said.step_seconds) / 4)
    assert said.tokens_per_second == pytest.approx(10 / (said.prefill_seconds + sum(said.step_seconds)))
    assert greedy(1).seconds_per_token > 0


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_row_ends_at_a_stop_token_and_the_others_go_on(folder, name, as_list):
    stop = greedy(3).tokens[0][2]
    (folder / name).write_text(json.dumps({"eos_token_id": [stop] if as_list else stop}))
    said = generate(folder, [PROMPT, [9, 9]], max_new_tokens=9, threads=1)

    assert said.tokens[0] == greedy(3).tokens[0]
    assert said.finish[0] == "stop"
    assert len(said.tokens[1]) == 9 or said.tokens[1][-1] == stop


def test_generation_config_is_asked_first_and_an_argument_before_it(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')

    assert Writer(folder).stop == {7, 8}
    assert Writer(folder, stop=[1]).stop == {1}


def test_generation_ends_where_every_row_has_stopped():
    stop = greedy(1).tokens[0][0]

    assert greedy(9, stop=[stop]).tokens == ((stop,),)


def test_side_files_may_lie_one_folder_above(folder):
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx" / "model.onnx")

    assert Writer(folder / "onnx").tokenizer is not None


def test_a_batch_gives_what_its_rows_give_alone():
    model = CachedDecoder(Config(position_ids=True)).model()
    prompts = [PROMPT, [9], [2, 6, 5]]
    together = generate(model, prompts, max_new_tokens=8, threads=1)

    assert together.tokens == tuple(generate(model, p, max_new_tokens=8, threads=1).tokens[0] for p in prompts)


def test_a_static_model_writes_up_to_its_length():
    said = generate(Decoder(Config(static=(1, 12))).model(), PROMPT, max_new_tokens=50, threads=1)

    assert said.tokens == (greedy(7).tokens[0],)
    assert said.finish == ("length",)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "expected a prompt, found none"),
        ([[1], []], "at least one token"),
        ("text", r"tokenizer\.json beside the model"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(prompts, message):
    with pytest.raises(UsageError, match=message):
        generate(CachedDecoder().model(), prompts)


def test_prompts_of_several_lengths_need_a_mask():
    with pytest.raises(UsageError, match="no attention mask"):
        generate(CachedDecoder(Config(attention_mask=False)).model(), [[1, 2], [3]])


def test_a_prompt_beyond_a_static_model_is_refused():
    with pytest.raises(UsageError, match="below 4 tokens"):
        generate(Decoder(Config(static=(1, 4))).model(), PROMPT)


def test_a_cache_that_is_asked_for_must_be_there():
    with pytest.raises(UsageError, match=r"past_key_values\.\*"):
        Writer(Decoder().model(), cached=True)


def test_embeddings_cannot_be_written():
    class Embedded(Decoder):
        def declare(self):
            self.graph.input("inputs_embeds", 1, ["batch", "sequence", 32])

        def model(self):
            self.declare()
            self.graph.output(self.norm("inputs_embeds"), "logits", 1, ["batch", "sequence", 32])
            return self.graph.model("embedded")

    with pytest.raises(UsageError, match="found `inputs_embeds` only"):
        Writer(Embedded().model())


@pytest.mark.parametrize(("name", "kind"), [("tokenizer.json", "a tokenizer"), ("config.json", "JSON")])
def test_a_broken_side_file_is_named(folder, name, kind):
    (folder / name).write_text("{")
    with pytest.raises(InputError, match=f"expected {kind}.*{name}"):
        Writer(folder)


def test_a_config_that_is_no_object_says_nothing(folder):
    (folder / "config.json").write_text("[1]")

    assert Writer(folder).stop == frozenset()


def test_a_character_of_several_tokens_is_said_once_it_is_whole():
    tokenizer = Tokenizer(models.BPE({"<0xC3>": 0, "<0xA9>": 1, "a": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    reader = Reader(tokenizer)

    assert [reader.read(token) for token in (2, 0, 1, 2)] == ["a", "", "é", "a"]


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
def test_only_what_is_asked_for_is_drawn(sampling, possible):
    assert set(drawn(sampling).tolist()) == possible


def test_tokens_are_drawn_as_often_as_they_are_likely():
    shares = np.bincount(drawn(Sampling(temperature=1.0), times=4000)) / 4000

    assert np.abs(shares - np.exp(LOGITS[0])).max() < 0.03


def test_a_seed_repeats_itself_and_another_does_not():
    same, again, other = (drawn(Sampling(temperature=1.0, seed=seed)).tolist() for seed in (1, 1, 2))

    assert same == again
    assert same != other


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": np.nan}, {"top_k": 0}, {"top_p": 0.0}])
def test_a_sampling_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        Sampling(**wrong)


def test_logits_of_a_text_are_the_same_with_a_cache_and_without(tmp_path):
    demo = Path(kvsurgeon.__file__).parent / "demo" / "model"
    path = kvsurgeon.inject(demo, tmp_path / "out", verify=False).path
    without, cached = Writer(demo), Writer(path)
    text = without.encode("It was late, and nobody came.")[0]
    for _ in range(2):  # nothing is remembered from one text to the next
        expected, found = without.logits(text), cached.logits(text)
        assert expected.shape == (1, len(text), 1024)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_token_ids_are_a_prompt_where_there_is_no_tokenizer():
    model = CachedDecoder().model()
    assert generate(model, "1, 2 3", max_new_tokens=4).tokens == generate(model, [1, 2, 3], max_new_tokens=4).tokens
