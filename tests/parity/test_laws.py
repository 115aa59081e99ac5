"""Laws of correct caches, for random texts and chunks."""

import itertools

import numpy as np
import pytest
from decoders import CachedDecoder as CachedModel
from decoders import Config, Decoder

from kvsurgeon.api import generate
from kvsurgeon.runtime import CachedDecoder, Sampling, UncachedDecoder, open_session

CONFIGS = [Config(), Config(position_ids=True), Config(dtype="float16")]
ALLOWED = {"float32": 1e-4, "float16": 2e-2}


@pytest.fixture(params=CONFIGS, ids=["float32", "position_ids", "float16"])
def config(request):
    return request.param


@pytest.fixture
def cached(config):
    return CachedDecoder(open_session(CachedModel(config).model(), threads=1))


@pytest.fixture
def uncached(config):
    return UncachedDecoder(open_session(Decoder(config).model(), threads=1))


def in_chunks(decoder, tokens, mask, cuts):
    feeds = decoder.inputs.feeds(tokens, mask)
    bounds = [0, *cuts, tokens.shape[1]]
    decoder.reset()
    steps = [decoder.step(decoder.inputs.part(feeds, *span)) for span in itertools.pairwise(bounds)]
    return np.concatenate(steps, axis=1).astype(np.float32)


def at_once(decoder, tokens, mask):
    return decoder.run(decoder.inputs.feeds(tokens, mask))[decoder.logits].astype(np.float32)


def texts(seed, rows, length):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 61, (rows, length))
    return random, tokens, np.ones_like(tokens)


@pytest.mark.parametrize("seed", range(8))
def test_prefill_and_decode_equal_the_whole(config, cached, uncached, seed):
    random, tokens, mask = texts(seed, rows=1, length=int(np.random.default_rng(seed).integers(2, 40)))
    cuts = sorted(set(random.integers(1, tokens.shape[1], 5).tolist()))

    whole = at_once(uncached, tokens, mask)

    assert np.abs(in_chunks(cached, tokens, mask, cuts) - whole).max() < ALLOWED[config.dtype] * whole.std()


def test_rows_do_not_depend_on_their_order(config, cached):
    random, tokens, mask = texts(0, rows=4, length=9)
    order = random.permutation(4)

    rows = in_chunks(cached, tokens, mask, [3, 4])

    assert np.abs(in_chunks(cached, tokens[order], mask, [3, 4]) - rows[order]).max() < ALLOWED[config.dtype]


def test_left_padding_changes_nothing_if_positions_follow_the_mask():
    cached = CachedDecoder(open_session(CachedModel(Config(position_ids=True)).model(), threads=1))
    _, tokens, mask = texts(0, rows=1, length=9)
    padded = np.pad(tokens, ((0, 0), (5, 0)))
    visible = np.pad(mask, ((0, 0), (5, 0)))

    rows = in_chunks(cached, padded, visible, [8, 9])[:, 5:]

    # a sliding window of array indices gives the same: padding is outside of it or masked
    assert np.abs(rows - in_chunks(cached, tokens, mask, [4])).max() < 1e-4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)])
def test_generates_the_same_tokens_with_and_without_a_cache(sampling):
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    options = {"max_new_tokens": 20, "sampling": sampling, "threads": 1}
    model = CachedModel().model()

    with_cache = generate(model, prompts, **options)
    assert with_cache.cached
    assert [len(row) for row in with_cache.tokens] == [20, 20]

    for other in (generate(Decoder().model(), prompts, **options), generate(model, prompts, cached=False, **options)):
        assert not other.cached
        assert other.tokens == with_cache.tokens
