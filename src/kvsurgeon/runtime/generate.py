"""Text from a model, token by token, with a cache and without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from kvsurgeon.errors import UsageError
from kvsurgeon.runtime.decoder import CachedDecoder, UncachedDecoder, has_cache
from kvsurgeon.runtime.feeds import Tokens
from kvsurgeon.runtime.sampling import Sampling
from kvsurgeon.runtime.session import Optimisation, Session, Source, open_session
from kvsurgeon.runtime.tensors import Array
from kvsurgeon.runtime.text import Prompt, Reader, load_tokenizer, side_folders, stop_tokens, tokens_of

Finish = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token that was generated."""

    row: int  # of the batch
    id: int
    text: str  # what it adds; empty without a tokenizer, and within a character
    seconds: float  # that the call took which gave it, for all rows together
    last: Finish | None = None  # why its row ends with it


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated, and how fast.

    Attributes:
        tokens: Of each row, without the prompt; a token that ends the text is included.
        texts: The same as text; empty without a tokenizer.
        finish: Why each row ended.
        cached: Whether a cache was used.
        prompt_length: Tokens of the longest prompt.
        prefill_seconds: Time that the first call took.
        step_seconds: Time that each further call took.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    finish: tuple[Finish, ...]
    cached: bool
    prompt_length: int
    prefill_seconds: float
    step_seconds: tuple[float, ...]

    @property
    def seconds_per_token(self) -> float:
        """Mean time of a call after the first; that of the first where there was no other."""
        return sum(self.step_seconds) / len(self.step_seconds) if self.step_seconds else self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows over the time of all calls."""
        seconds = self.prefill_seconds + sum(self.step_seconds)
        return sum(len(row) for row in self.tokens) / seconds if seconds else 0.0


class Writer:
    """A model that continues texts.

    Attributes:
        tokenizer: Turns text into tokens and back, where the model has one.
        stop: Tokens that end a text.
        cached: Whether a cache is used.
    """

    def __init__(
        self,
        model: Source | Session,
        *,
        cached: bool | None = None,
        tokenizer: Tokenizer | None = None,
        stop: Collection[int] | None = None,
        folder: str | Path | None = None,
        threads: int | None = None,
        optimisation: Optimisation = "all",
    ) -> None:
        """Open a model.

        Args:
            model: A file, a folder, a model in memory, or a session.
            cached: False computes the whole text for each token; None uses a cache if the model has one.
            tokenizer: Instead of the `tokenizer.json` beside the model.
            stop: Instead of the `eos_token_id` in the configuration beside the model.
            folder: Where the weights and side files of a model in memory lie.
            threads: Threads that onnxruntime may use for one operator.
            optimisation: How far onnxruntime may rewrite the graph.

        Raises:
            InputError: The model or a side file cannot be read.
            UsageError: A cache is asked for, and the model has none.
        """
        folders: tuple[Path, ...] = ()
        if not isinstance(model, Session):
            folders = side_folders(model, folder)
            model = open_session(model, folder=folder, threads=threads, optimisation=optimisation)
        remembers = has_cache(model)
        self.tokenizer = tokenizer or load_tokenizer(folders)
        self.stop = stop_tokens(folders) if stop is None else frozenset(stop)
        self.cached = remembers if cached is None else cached
        self._decoder = CachedDecoder(model) if remembers or self.cached else UncachedDecoder(model)
        if self._decoder.inputs.tokens.kind != "tokens":
            raise UsageError(f"expected an input of token ids, found `{self._decoder.inputs.tokens.name}` only")

    def stream(
        self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[Token]:
        """Yield tokens as they are generated, row by row within a call.

        Raises:
            UsageError: A prompt is text and there is no tokenizer, is empty, or cannot be padded.
            RunError: The model cannot be run on a text of this length.
        """
        sampling = sampling or Sampling()
        tokens, mask = self._padded(self.encode(prompts))
        random = np.random.default_rng(sampling.seed)
        readers = [Reader(self.tokenizer) for _ in tokens]
        ended: set[int] = set()
        self._forget()
        for count in range(1, max_new_tokens + 1):
            start = time.perf_counter()
            chosen = sampling.choose(self._next(tokens, mask), random)
            seconds = time.perf_counter() - start
            full = count == max_new_tokens or tokens.shape[1] + 1 == self._fixed_length()
            for row in sorted(set(range(len(tokens))) - ended):
                token = int(chosen[row])
                last: Finish | None = "stop" if token in self.stop else "length" if full else None
                ended |= {row} if last else set()
                yield Token(row=row, id=token, text=readers[row].read(token), seconds=seconds, last=last)
            if len(ended) == len(tokens):
                return
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        on_token: Callable[[Token], None] | None = None,
    ) -> Generation:
        """Return the continuations of all prompts; see `stream`."""
        lengths = [len(prompt) for prompt in self.encode(prompts)]
        rows: list[list[Token]] = [[] for _ in lengths]
        for token in self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling):
            rows[token.row].append(token)
            if on_token is not None:
                on_token(token)
        calls = [token.seconds for token in max(rows, key=len)]
        ids = tuple(tuple(token.id for token in row) for row in rows)
        return Generation(
            tokens=ids,
            texts=() if self.tokenizer is None else tuple(self.tokenizer.decode(list(row)) for row in ids),
            finish=tuple(row[-1].last or "length" for row in rows if row),
            cached=self.cached,
            prompt_length=max(lengths),
            prefill_seconds=sum(calls[:1]),
            step_seconds=tuple(calls[1:]),
        )

    def logits(self, tokens: Sequence[int]) -> Array:
        """Return the logits of every token of a text, `[1, length, vocabulary]`; of the last alone where that is all.

        Raises:
            RunError: The model cannot be run on a text of this length.
        """
        given = np.array([tokens], np.int64)
        decoder, length = self._decoder, len(tokens)
        self._forget()
        fill = 0 if isinstance(decoder, CachedDecoder) else (decoder.length or length) - length
        padded = np.pad(given, ((0, 0), (0, fill)), mode="edge")
        feeds = decoder.inputs.whole(padded, np.ones_like(padded))
        outputs = decoder.advance(feeds) if isinstance(decoder, CachedDecoder) else decoder.run(feeds)
        return outputs[decoder.logits][:, :length]

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens of one prompt or of several.

        Raises:
            UsageError: A prompt is text and there is no tokenizer, or it is empty.
        """
        several = [prompts] if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)) else prompts
        if not several:
            raise UsageError("expected a prompt, found none")
        return [tokens_of(prompt, self.tokenizer) for prompt in several]  # type: ignore[arg-type]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tokens, Tokens]:
        """Return the prompts as a batch, padded on the left, and where it is not padding."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        if min(lengths) < longest and not self._decoder.inputs.masked:
            raise UsageError(f"expected prompts of one length, found {lengths}: the model has no attention mask")
        fixed = self._fixed_length()
        if fixed is not None and longest >= fixed:
            raise UsageError(f"expected a prompt below {fixed} tokens, the length of the model, found {longest}")
        tokens = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        return tokens, mask

    def _fixed_length(self) -> int | None:
        return self._decoder.length if isinstance(self._decoder, UncachedDecoder) else None

    def _forget(self) -> None:
        if isinstance(self._decoder, CachedDecoder):
            self._decoder.reset()

    def _next(self, tokens: Tokens, mask: Tokens) -> Array:
        """Return the logits of the token after the last, `[batch, vocabulary]`."""
        decoder, length = self._decoder, tokens.shape[1]
        if isinstance(decoder, CachedDecoder):
            if not self.cached:
                decoder.reset()
            feeds = decoder.inputs.whole(tokens, mask)
            return decoder.step(decoder.inputs.part(feeds, decoder.past_length, length))[:, -1]
        fill = ((0, 0), (0, (decoder.length or length) - length))  # what follows does not change what is before it
        feeds = decoder.inputs.whole(np.pad(tokens, fill, mode="edge"), np.pad(mask, fill, constant_values=1))
        logits = decoder.run(feeds)[decoder.logits]
        return logits[:, min(length, logits.shape[1]) - 1]


def generate(
    model: Source | Session,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    cached: bool | None = None,
    tokenizer: Tokenizer | None = None,
    stop: Collection[int] | None = None,
    folder: str | Path | None = None,
    threads: int | None = None,
    on_token: Callable[[Token], None] | None = None,
) -> Generation:
    """Open a model and continue one prompt or several; see `Writer` for the arguments.

    Raises:
        InputError: The model or a side file cannot be read.
        UsageError: The model cannot continue such prompts.
        RunError: The model cannot be run on them.
    """
    writer = Writer(model, cached=cached, tokenizer=tokenizer, stop=stop, folder=folder, threads=threads)
    return writer.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling, on_token=on_token)
