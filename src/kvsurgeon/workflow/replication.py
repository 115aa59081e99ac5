"""The whole walk of replicating KV heads: generate, replicate, generate again, compare, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsurgeon import io
from kvsurgeon.errors import ParityError
from kvsurgeon.io.side_files import LinkMode
from kvsurgeon.parity import TOLERANCES, arithmetic_of
from kvsurgeon.parity.difference import distance, spread
from kvsurgeon.passes.contract import Changed
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.runtime import Generation, Writer
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.surgery import Surgery, operate

Prompt = str | Sequence[int]
PROMPT = "My name is"


@dataclass(frozen=True, kw_only=True)
class Replication:
    """A model with replicated KV heads, and what it and the original wrote.

    Attributes:
        path: The model file, in the folder `<name>-<n>kvheads`.
        kv_heads: How many each layer had, and how many it has.
        before: What the original wrote.
        after: What the result wrote: the same tokens.
        error: Largest difference of their logits for prompt and answer, over the spread of the original's.
        surgery: What was done, and what the judge said.
    """

    path: Path
    kv_heads: tuple[tuple[int, ...], tuple[int, ...]]
    before: Generation
    after: Generation
    error: float
    surgery: Surgery


def replicate_kv_heads(
    model: str | Path,
    *,
    prompt: Prompt = PROMPT,
    repeat: int | None = 2,
    kv_heads: int | None = None,
    max_new_tokens: int = 32,
    output: str | Path | None = None,
    verify: bool = True,
    link_mode: LinkMode = "link",
    pack: bool = False,
) -> Replication:
    """Replicate the KV heads of a model on disk, show that it writes what it wrote, and save it.

    Args:
        model: An .onnx file or a folder that holds one, with a cache or without.
        prompt: What both are to continue: a text, or token ids where there is no tokenizer.
        repeat: How often each head is to stand there.
        kv_heads: How many heads there are to be, in place of `repeat`.
        max_new_tokens: How many tokens both write at most.
        output: The folder in which the new folder is made; None takes the one that the model's folder is in.
        verify: Whether the judge compares the two besides.
        link_mode: How weights that are as they were get into the new folder; see `kvsurgeon.save`.
        pack: Whether all weights go into one new data file; see `kvsurgeon.save`.

    Raises:
        UsageError: There cannot be so many heads; the message lists the counts that there can be.
        InputError: The model cannot be read.
        UnsupportedError: It cannot be proved which weights make the heads, or there is nothing to be done.
        ParityError: The result writes something else; nothing was written.
    """
    file = io.find_model(model).resolve()
    original = Writer(file)
    before = original.generate(prompt, max_new_tokens=max_new_tokens)
    wanted = ReplicateKvHeads(repeat=None if kv_heads is not None else repeat, kv_heads=kv_heads)
    surgery = operate(file, Pipeline((wanted,)), verify=verify)
    folder = Path(output) if output is not None else file.parent.parent
    with io.staged(surgery.model, folder) as proto:
        after, error = _compared(file, original, before, Writer(proto, folder=file.parent), prompt, max_new_tokens)
    counts = _counts(surgery)
    name = f"{file.parent.name}-{max(counts[1])}kvheads"
    path = io.save(surgery.model, folder / name, source=file, link_mode=link_mode, pack=pack)
    return Replication(path=path, kv_heads=counts, before=before, after=after, error=error, surgery=surgery)


def _compared(
    file: Path, original: Writer, before: Generation, result: Writer, prompt: Prompt, max_new_tokens: int
) -> tuple[Generation, float]:
    """What the result writes, and how far its logits are from the original's.

    Raises:
        ParityError: It writes something else.
    """
    after = result.generate(prompt, max_new_tokens=max_new_tokens)
    if after.tokens != before.tokens:
        raise ParityError(
            f"expected the tokens {_shown(before)} after the prompt, as before, found {_shown(after)}; "
            "nothing was written"
        )
    text = [*original.encode(prompt)[0], *before.tokens[0]]
    expected, found = original.logits(text), result.logits(text)
    error = distance(expected, found, spread(expected))
    allowed = TOLERANCES[arithmetic_of(io.to_proto(io.load(file)))].error
    if not error <= allowed:
        raise ParityError(
            f"expected logits within {allowed:.0e} of their spread, found {error:.1e}; nothing was written"
        )
    return after, error


def _counts(surgery: Surgery) -> tuple[tuple[int, ...], tuple[int, ...]]:
    changes = (step.outcome.heads for step in surgery.steps if isinstance(step.outcome, Changed))
    before, after = next(change for change in changes if change is not None)
    return before.kv, after.kv


def _shown(made: Generation) -> str:
    return ", ".join(map(str, made.tokens[0][:8]))
