"""Prompts for clients, and the tokens that the model without a cache generates in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kvsurgeon.runtime import UncachedDecoder, ValueInfo, open_session
from kvsurgeon.runtime.tensors import from_runtime, to_runtime
from kvsurgeon.targets.target import EMBEDDING, EMBEDDINGS, ENCODER, VISION

SMOLLM2_NEW = 32
VOCABULARY = 40  # token ids that any model has


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt, and the number of tokens to generate.

    Attributes:
        name: Name of the case.
        ids: Token ids `[batch, length]`.
        mask: Attention mask `[batch, length]`, 0 for padding.
        new: Number of tokens to generate.
        chunk: Length of the chunks of the prompt; None for one chunk.
        encoder: Inputs of the encoder by name, of an encoder-decoder model; empty for another one.
        pixels: The input `pixel_values` of the vision encoder; empty if there is no image.
    """

    name: str
    ids: list[list[int]]
    mask: list[list[int]]
    new: int
    chunk: int | None = None
    encoder: dict[str, list] = field(default_factory=dict)
    pixels: list = field(default_factory=list)

    def request(self) -> dict:
        """Return the request to a client."""
        return asdict(self)


def small_cases(*, batch: bool, padded: bool, chunked: bool, new: int) -> Iterator[Case]:
    """Yield the cases of a small model."""
    ids = np.random.default_rng(7).integers(3, VOCABULARY, (2, 9))
    ones = np.ones_like(ids)
    yield Case(name="single", ids=ids[:1].tolist(), mask=ones[:1].tolist(), new=new)
    if batch:
        yield Case(name="batch", ids=ids.tolist(), mask=ones.tolist(), new=new)
    if padded:
        mask = ones.copy()
        mask[1, :4] = 0
        yield Case(name="padded", ids=np.where(mask, ids, 0).tolist(), mask=mask.tolist(), new=new)
    if chunked:
        yield Case(name="chunked", ids=ids[:1].tolist(), mask=ones[:1].tolist(), new=new, chunk=4)


def encoder_cases(folder: Path, *, new: int) -> Iterator[Case]:
    """Yield the cases of an encoder-decoder model: one text or sound, and two, one of them with padding at its end."""
    random = np.random.default_rng(7)
    arrays = {one.name: _encoder_input(one, random) for one in open_session(folder / ENCODER, threads=1).inputs}
    start = json.loads((folder / "config.json").read_text("utf-8"))["decoder_start_token_id"]
    for name, rows in (("single", 1), ("batch", 2)):
        encoder = {key: array[:rows].tolist() for key, array in arrays.items()}
        yield Case(name=name, ids=[[start]] * rows, mask=[[1]] * rows, new=new, encoder=encoder)


def image_cases(folder: Path, *, new: int) -> Iterator[Case]:
    """Yield a text with an image, unless the vision encoder needs more than the image."""
    random = np.random.default_rng(7)
    inputs = open_session(folder / VISION, threads=1).inputs
    if len(inputs) == 1:
        pixels = random.standard_normal([one if isinstance(one, int) else 1 for one in inputs[0].dims])
        features = _features(folder, pixels)
        ids = random.integers(3, VOCABULARY, 9)
        ids = [*ids[:4].tolist(), *[_image_token(folder)] * len(features), *ids[4:].tolist()]
        yield Case(name="image", ids=[ids], mask=[[1] * len(ids)], new=new, pixels=pixels.tolist())


def _image_token(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return config.get("image_token_id", config.get("image_token_index"))


def _features(folder: Path, pixels: np.ndarray) -> np.ndarray:
    """Return the rows of an image that replace those of its tokens."""
    session = open_session(folder / VISION, threads=1)
    (features,) = session.run({session.inputs[0].name: to_runtime(pixels.astype(np.float32))}).values()
    return from_runtime(features).reshape(-1, from_runtime(features).shape[-1])


def _encoder_input(tensor: ValueInfo, random: np.random.Generator) -> np.ndarray:
    shape = [2, *(dim if isinstance(dim, int) else 9 for dim in tensor.dims[1:])]
    if tensor.floating:
        return random.standard_normal(shape).astype(np.float32)
    if "mask" not in tensor.name:
        return random.integers(3, VOCABULARY, shape)
    mask = np.ones(shape, np.int64)
    mask[1, 6:] = 0
    return mask


def smollm2_cases(expected: Path, *, chunked: bool) -> list[tuple[Case, list[list[int]]]]:
    """Return prompts with the tokens of transformers' `generate`, which the example script recorded."""
    cases = []
    for record in json.loads(expected.read_text("utf-8")):
        ids = [record["input_ids"]]
        ones = [[1] * len(record["input_ids"])]
        tokens = [record["tokens"][:SMOLLM2_NEW]]
        for chunk in (None, 4) if chunked else (None,):
            name = f"{record['prompt'][:24]!r}" + ("" if chunk is None else " chunked")
            cases.append((Case(name=name, ids=ids, mask=ones, new=SMOLLM2_NEW, chunk=chunk), tokens))
    return cases


def takes_padding(original: Path) -> bool:
    """Return whether a model has an attention mask."""
    return UncachedDecoder(open_session(original, threads=1)).inputs.masked


def expected_tokens(original: Path, case: Case) -> list[list[int]]:
    """Return the tokens of greedy decoding, which runs the whole text for each token."""
    decoder = UncachedDecoder(open_session(original, threads=1))
    ids, mask = np.array(case.ids), np.array(case.mask)
    encoded = _encoder_output(original.parent, case) if case.encoder else {}
    for _ in range(case.new):
        feeds = decoder.inputs.feeds(ids, mask)
        if EMBEDDINGS in feeds:
            encoded[EMBEDDINGS] = _embeddings(original.parent, ids, case)
        logits = decoder.run(feeds | {name: array for name, array in encoded.items() if name in feeds})[decoder.logits]
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    return ids[:, -case.new :].tolist()


def _embeddings(folder: Path, ids: np.ndarray, case: Case) -> np.ndarray:
    """Return the embeddings of token ids, with the rows of an image in place of those of its tokens."""
    (found,) = open_session(folder / EMBEDDING, threads=1).run({"input_ids": to_runtime(ids)}).values()
    rows = from_runtime(found)
    if case.pixels:
        rows = rows.copy()
        rows[ids == _image_token(folder)] = _features(folder, np.array(case.pixels))
    return rows


def _encoder_output(folder: Path, case: Case) -> dict[str, np.ndarray]:
    """Return the inputs of the decoder that come from the encoder."""
    session = open_session(folder / ENCODER, threads=1)
    given = {one.name: np.array(case.encoder[one.name]).astype(one.dtype) for one in session.inputs}
    (output,) = session.run({name: to_runtime(array) for name, array in given.items()}).values()
    mask = {"encoder_attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
    return {"encoder_hidden_states": from_runtime(output), **mask}
