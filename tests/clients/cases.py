"""Prompts for clients, and the tokens that the model without a cache generates in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvsurgeon.runtime import UncachedDecoder, open_session

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
    """

    name: str
    ids: list[list[int]]
    mask: list[list[int]]
    new: int
    chunk: int | None = None

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
    for _ in range(case.new):
        logits = decoder.run(decoder.inputs.feeds(ids, mask))[decoder.logits]
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    return ids[:, -case.new :].tolist()
