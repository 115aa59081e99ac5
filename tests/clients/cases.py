"""What clients are asked, and what the model without a cache answers in onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvsurgeon.runtime import UncachedDecoder, open_session

SMOLLM2_NEW = 32
VOCABULARY = 40  # ids that any model knows


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt, and how many tokens are to follow it.

    Attributes:
        name: What is special about it.
        ids: Tokens, a row for each text of the batch.
        mask: 1 where a token counts, 0 where it is padding.
        new: Tokens to follow.
        chunk: Tokens of the prompt that are given at once; None to give all.
    """

    name: str
    ids: list[list[int]]
    mask: list[list[int]]
    new: int
    chunk: int | None = None

    def asked(self) -> dict:
        """Return what a client is told."""
        return asdict(self)


def small_cases(*, batch: bool, padded: bool, chunked: bool, new: int) -> Iterator[Case]:
    """Yield what a small model is asked."""
    ids = np.random.default_rng(7).integers(3, VOCABULARY, (2, 9))
    ones = np.ones_like(ids)
    yield Case(name="alone", ids=ids[:1].tolist(), mask=ones[:1].tolist(), new=new)
    if batch:
        yield Case(name="batch", ids=ids.tolist(), mask=ones.tolist(), new=new)
    if padded:
        mask = ones.copy()
        mask[1, :4] = 0
        yield Case(name="padded", ids=np.where(mask, ids, 0).tolist(), mask=mask.tolist(), new=new)
    if chunked:
        yield Case(name="chunked", ids=ids[:1].tolist(), mask=ones[:1].tolist(), new=new, chunk=4)


def smollm2_cases(expected: Path, *, chunked: bool) -> list[tuple[Case, list[list[int]]]]:
    """Return prompts with what transformers' `generate` said, as the repository's example script wrote it down."""
    cases = []
    for record in json.loads(expected.read_text("utf-8")):
        ids = [record["input_ids"]]
        ones = [[1] * len(record["input_ids"])]
        answer = [record["tokens"][:SMOLLM2_NEW]]
        for chunk in (None, 4) if chunked else (None,):
            name = f"{record['prompt'][:24]!r}" + ("" if chunk is None else " chunked")
            cases.append((Case(name=name, ids=ids, mask=ones, new=SMOLLM2_NEW, chunk=chunk), answer))
    return cases


def takes_padding(original: Path) -> bool:
    """Return whether a model is told which tokens are padding."""
    return UncachedDecoder(open_session(original, threads=1)).inputs.masked


def answer(original: Path, case: Case) -> list[list[int]]:
    """Return the likeliest tokens, the whole text being computed anew for each."""
    decoder = UncachedDecoder(open_session(original, threads=1))
    ids, mask = np.array(case.ids), np.array(case.mask)
    for _ in range(case.new):
        logits = decoder.run(decoder.inputs.feeds(ids, mask))[decoder.logits]
        ids = np.concatenate([ids, logits[:, -1:].argmax(-1)], axis=1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
    return ids[:, -case.new :].tolist()
