"""Text generation, token by token, with a cache and without one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvsurgeon.errors import UsageError
from kvsurgeon.io.locate import find_model
from kvsurgeon.runtime.axes import is_past
from kvsurgeon.runtime.chat import chat_prompt
from kvsurgeon.runtime.continuous_batching import ContinuousBatch
from kvsurgeon.runtime.decoder import CachedDecoder, UncachedDecoder
from kvsurgeon.runtime.feeds import Tokens
from kvsurgeon.runtime.prefill import open_prefill
from kvsurgeon.runtime.providers import CPU
from kvsurgeon.runtime.sampling import Sampling
from kvsurgeon.runtime.session import Optimization, Session, Source, open_session
from kvsurgeon.runtime.tensors import Array
from kvsurgeon.runtime.text import Prompt, encode_prompt, load_tokenizer, side_folders, stop_tokens, text_decoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FinishReason = Literal["stop", "length"]
_SHOWN = 60  # characters of each text in a short form


@dataclass(frozen=True, kw_only=True)
class GeneratedToken:
    """A generated token.

    Attributes:
        row: Row of the batch.
        id: Token ID.
        text: Text that the token adds; empty without a tokenizer and within a character.
        seconds: Time of the call that returned its logits, for all rows together.
        finish: Reason why its row ends with it; None if the row continues.
    """

    row: int
    id: int
    text: str
    seconds: float
    finish: FinishReason | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generated tokens of all rows, and timings.

    Attributes:
        tokens: Tokens of each row, without the prompt; a stop token is included.
        texts: Text of each row; empty without a tokenizer.
        finish: Reason why each row ended.
        cached: Whether a cache was used.
        prompt_length: Tokens of the longest prompt.
        prefill_seconds: Time of the first call.
        step_seconds: Time of each later call.
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    finish: tuple[FinishReason, ...]
    cached: bool
    prompt_length: int
    prefill_seconds: float
    step_seconds: tuple[float, ...]

    def __repr__(self) -> str:
        """Return the text of each row, or its first tokens."""
        rows = [one if len(one) <= _SHOWN else f"{one[:_SHOWN]}..." for one in self.texts or map(str, self.tokens)]
        return f"Generation({', '.join(map(repr, rows))}, {self.tokens_per_second:.1f} tokens/s)"

    @property
    def seconds_per_token(self) -> float:
        """Mean time of the calls after the first; time of the first if it is the only one."""
        return sum(self.step_seconds) / len(self.step_seconds) if self.step_seconds else self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Number of tokens of all rows, divided by the time of all calls."""
        seconds = self.prefill_seconds + sum(self.step_seconds)
        return sum(len(row) for row in self.tokens) / seconds if seconds else 0.0


@dataclass(kw_only=True)
class _Text:
    """A text that is generated: the place of its prompt, its tokens without the prompt, and their decoder."""

    place: int
    decode: Callable[[int], str]
    tokens: list[int] = field(default_factory=list)

    def add(self, token: int) -> str:
        """Add a token, and return the text that it adds."""
        self.tokens.append(token)
        return self.decode(token)


class TextGenerator:
    """A model that continues texts.

    Attributes:
        tokenizer: The model's tokenizer, if there is one.
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
        provider: str = CPU,
        optimization: Optimization = "all",
    ) -> None:
        """Open a model, and the `prefill.onnx` next to it if that is a part of it, as `separate-prefill` writes it.

        Args:
            model: A file, a folder, a model in memory, or a session.
            cached: False computes the whole text for each token; None uses a cache if the model has one.
            tokenizer: Replaces the `tokenizer.json` next to the model.
            stop: Replaces the `eos_token_id` of the configuration next to the model.
            folder: Folder of the weights and side files of a model in memory.
            threads: Number of threads per operator.
            provider: Execution provider; see `open_session`.
            optimization: Level of onnxruntime's graph optimization.

        Raises:
            InputError: The model or a side file cannot be read.
            UsageError: `cached` is true and the model has no cache, or it takes no token IDs.
        """
        folders: tuple[Path, ...] = ()
        path = find_model(model) if isinstance(model, str | Path) else None
        options: dict[str, Any] = {"threads": threads, "optimization": optimization, "provider": provider}
        if not isinstance(model, Session):
            folders = side_folders(model, folder)
            model = open_session(model, folder=folder, **options)
        self.tokenizer = tokenizer or load_tokenizer(folders)
        self.stop = stop_tokens(folders) if stop is None else frozenset(stop)
        has_cache = any(is_past(tensor) for tensor in model.inputs)
        self.cached = has_cache if cached is None else cached
        self._session = model
        self._folders = folders
        self._decoder = CachedDecoder(model) if has_cache or self.cached else UncachedDecoder(model)
        if self._decoder.inputs.tokens.kind != "tokens":
            raise UsageError(f"expected an input of token ids, found `{self._decoder.inputs.tokens.name}` only")
        self._prefill: Session | None = None
        if path is not None and self.cached and isinstance(self._decoder, CachedDecoder):
            self._prefill = open_prefill(self._decoder, path, **options)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[GeneratedToken]:
        """Yield tokens as they are generated, row by row within a call.

        Raises:
            UsageError: A prompt is text and there is no tokenizer, is empty, or cannot be padded.
            RunError: The model fails on a text of this length.
        """
        sampling = sampling or Sampling()
        tokens, mask = self._left_padded(self.encode(prompts))
        random = np.random.default_rng(sampling.seed)
        decoders = [text_decoder(self.tokenizer) for _ in tokens]
        running = set(range(len(tokens)))
        if isinstance(self._decoder, CachedDecoder):
            self._decoder.reset()
        for count in range(1, max_new_tokens + 1):
            start = time.perf_counter()
            chosen = sampling.choose(self._next_logits(tokens, mask), random)
            seconds = time.perf_counter() - start
            full = count == max_new_tokens or tokens.shape[1] + 1 == self._decoder.length
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            for row in sorted(running):
                token = int(chosen[row])
                finish: FinishReason | None = "stop" if token in self.stop else "length" if full else None
                running -= {row} if finish else set()
                yield GeneratedToken(row=row, id=token, text=decoders[row](token), seconds=seconds, finish=finish)
            if not running:
                return

    def stream_continuously(
        self, prompts: Sequence[Prompt], *, rows: int = 8, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[GeneratedToken]:
        """Yield tokens as they are generated; a waiting prompt starts as soon as another text ends.

        Args:
            prompts: Any number of prompts, of any lengths. A token's `row` is the place of its prompt.
            rows: The most texts at a time.
            max_new_tokens: The most tokens of a text.
            sampling: How tokens are chosen.

        Raises:
            UsageError: The model does not take sequences of different lengths.
            RunError: The model fails on a text of this length.
        """
        sampling, waiting = sampling or Sampling(), deque(enumerate(self.encode(prompts)))
        random, longest = np.random.default_rng(sampling.seed), max(len(prompt) for _, prompt in waiting)
        batch = ContinuousBatch(self._session, rows=rows, capacity=longest + max_new_tokens)
        texts: dict[int, _Text] = {}
        while waiting or texts:
            start = time.perf_counter()
            if waiting and not batch.is_full:
                place, prompt = waiting.popleft()
                number, logits = batch.start(prompt)
                texts[number] = _Text(place=place, decode=text_decoder(self.tokenizer))
                results = {number: logits[-1]}
            else:
                results = batch.step({number: text.tokens[-1] for number, text in texts.items()})
            seconds = time.perf_counter() - start
            for number, logits in results.items():
                text, token = texts[number], int(sampling.choose(logits[None], random)[0])
                full = len(text.tokens) + 1 == max_new_tokens or batch.lengths[number] == batch.capacity
                finish: FinishReason | None = "stop" if token in self.stop else "length" if full else None
                added = text.add(token)
                if finish:
                    batch.end(number)
                    del texts[number]
                yield GeneratedToken(row=text.place, id=token, text=added, seconds=seconds, finish=finish)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        on_token: Callable[[GeneratedToken], None] | None = None,
    ) -> Generation:
        """Return the continuations of all prompts; see `stream`."""
        lengths = [len(prompt) for prompt in self.encode(prompts)]
        rows: list[list[GeneratedToken]] = [[] for _ in lengths]
        for token in self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling):
            rows[token.row].append(token)
            if on_token is not None:
                on_token(token)
        calls = [token.seconds for token in max(rows, key=len)]
        ids = tuple(tuple(token.id for token in row) for row in rows)
        return Generation(
            tokens=ids,
            texts=() if self.tokenizer is None else tuple(self.tokenizer.decode(list(row)) for row in ids),
            finish=tuple(row[-1].finish or "length" for row in rows if row),
            cached=self.cached,
            prompt_length=max(lengths),
            prefill_seconds=sum(calls[:1]),
            step_seconds=tuple(calls[1:]),
        )

    def logits(self, tokens: Sequence[int]) -> Array:
        """Return the logits of a text, `[1, length, vocabulary]`, or `[1, 1, vocabulary]` for the last token only.

        Raises:
            RunError: The model fails on a text of this length.
        """
        text = np.array([tokens], np.int64)
        return self._logits(text, np.ones_like(text))

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        """Return the token IDs of one prompt or several.

        Raises:
            UsageError: A prompt is text and there is no tokenizer, or it is empty.
        """
        several = [prompts] if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)) else prompts
        if not several:
            raise UsageError("expected a prompt, found none")
        return [encode_prompt(prompt, self.tokenizer) for prompt in several]  # type: ignore[arg-type]

    def encode_chat(self, message: str) -> list[int]:
        """Return the token IDs of a message of a user in the chat template of the model.

        Raises:
            UsageError: There is no tokenizer or no template, or it cannot be rendered.
        """
        text = chat_prompt(message, self._folders)
        if self.tokenizer is None:
            raise UsageError("expected tokenizer.json next to the model for a chat template, found none")
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tokens, Tokens]:
        """Return the prompts as a batch with left padding, and its mask."""
        lengths = [len(prompt) for prompt in prompts]
        longest, limit = max(lengths), self._decoder.length
        if min(lengths) < longest and not self._decoder.inputs.masked:
            raise UsageError(f"expected prompts of one length, found {lengths}: the model has no attention mask")
        if limit is not None and longest >= limit:
            raise UsageError(f"expected a prompt below {limit} tokens, the length of the model, found {longest}")
        tokens = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], np.int64)
        mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
        return tokens, mask.astype(np.int64)

    def _next_logits(self, tokens: Tokens, mask: Tokens) -> Array:
        """Return the logits of the next token, `[batch, vocabulary]`."""
        decoder = self._decoder
        if isinstance(decoder, CachedDecoder) and self.cached:
            feeds = decoder.inputs.feeds(tokens, mask)
            if self._prefill is not None and not decoder.past_length and tokens.shape[1] > 1:
                decoder.advance(decoder.inputs.part(feeds, 0, tokens.shape[1] - 1), self._prefill)
            return decoder.step(decoder.inputs.part(feeds, decoder.past_length, tokens.shape[1]))[:, -1]
        return self._logits(tokens, mask)[:, -1]

    def _logits(self, tokens: Tokens, mask: Tokens) -> Array:
        """Return the logits of texts, run as a whole; right padding to a fixed length is masked by causality."""
        decoder, length = self._decoder, tokens.shape[1]
        padding = ((0, 0), (0, (decoder.length or length) - length))
        feeds = decoder.inputs.feeds(np.pad(tokens, padding, mode="edge"), np.pad(mask, padding, constant_values=1))
        return decoder.run(feeds)[decoder.logits][:, :length]
