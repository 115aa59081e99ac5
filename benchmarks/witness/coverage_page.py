"""docs/coverage.md: what became of every model of a corpus, as a page for people."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from witness.verdicts import VERDICTS, Result

COMMAND = "python benchmarks/coverage.py ../shared/corpus --markdown docs/coverage.md"
MARKS = {"refused": "r", "not runnable": "n", "wrong": "!", "crashed": "!", "hung": "!"}

# What stands behind a refusal, by words of its message.
BEHIND = {
    "no rule that says whether it keeps tokens apart": (
        "What this operator does to tokens depends on their values, or nobody has written down what it does to axes. "
        "Nothing is assumed of it."
    ),
    "picks tokens by their place": (
        "Which tokens are written or read follows from numbers that are known at run time only, or by a place that is "
        "another one when tokens come in parts."
    ),
    "mixes tokens along the sequence": (
        "A running sum, a convolution or a recurrence over tokens has a state of its own beside keys and values."
    ),
    "fused attention that also projects": (
        "onnxruntime's `Attention` holds the projection to queries, keys and values. A cache belongs behind that "
        "product, and would need the operator to be taken apart."
    ),
    "would be state of its own": (
        "Something that is made of all tokens is needed besides keys and values, such as a mask computed from the ids."
    ),
    "lost sight of": "An operator leaves an axis of another length, from which tokens cannot be found again.",
    "control flow": "A branch or a loop that tokens decide on may do anything to them.",
    "masked by what masks another": "In a batch of several texts this export masks one by the padding of another.",
    "sees the future": "What would be remembered of a token depends on tokens after it.",
    "context changes": "Positions, frequencies or masks of a token change with the tokens that follow it.",
}


def as_markdown(results: Sequence[Result]) -> str:
    """Return the page: counts, what was refused and why, families by exporter, and what must be refused."""
    lines = [
        "# Coverage",
        "",
        "Every model of a corpus of tiny exports: injected, and then run against the logits that its source framework",
        "gave, in one call, token by token and in ragged chunks, with left padding. How each is judged stands in the",
        "[benchmarks](../benchmarks/README.md#coveragepy). This page is written by",
        "",
        "```sh",
        COMMAND,
        "```",
        "",
        *_counts(results),
        "",
        "## UnsupportedError, though a cache would be right",
        "",
        *_refused(results),
        "",
        "## Families and exporters",
        "",
        *_families(results),
        "",
        "## UnsupportedError, as it must be",
        "",
        *_declined(results),
    ]
    return "\n".join(lines) + "\n"


def _counts(results: Sequence[Result]) -> Iterator[str]:
    shown = [verdict for verdict in VERDICTS if verdict in ("right", "refused") or _any(results, verdict)]
    yield "| a cache would be | models | " + " | ".join(shown) + " |"
    yield "| --- | --- |" + " --- |" * len(shown)
    for expected, words in (("inject", "right"), ("either", "right, if done with care"), ("refuse", "wrong")):
        members = [result for result in results if result.expected == expected]
        counts = Counter(result.verdict for result in members)
        cells = " | ".join(str(counts[verdict]) for verdict in shown)
        yield f"| {words} | {len(members)} | {cells} |"


def _any(results: Sequence[Result], verdict: str) -> bool:
    return any(result.verdict == verdict for result in results)


def _refused(results: Sequence[Result]) -> Iterator[str]:
    refused = [result for result in results if result.verdict == "refused" and result.expected == "inject"]
    if not refused:
        yield "None."
    for result in refused:
        yield f"- **{result.family}**, {result.exporter} (`{result.group}/{result.name}`): {_said(result)}"
        yield f"  {_behind(result)}"


def _behind(result: Result) -> str:
    return next((why for words, why in BEHIND.items() if words in result.reason), "Not explained yet.")


def _families(results: Sequence[Result]) -> Iterator[str]:
    judged = [result for result in results if result.expected != "refuse"]
    exporters = [name for name, _ in Counter(result.exporter for result in judged).most_common()]
    cells: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in judged:
        cells[result.family, result.exporter].append(result)
    yield "Injected and right, of how many; `r` refused, `n` injected but not runnable in onnxruntime, `!` wrong."
    yield ""
    yield "| family | " + " | ".join(exporters) + " |"
    yield "| --- |" + " --- |" * len(exporters)
    for family in sorted({result.family for result in judged}):
        yield f"| {family} | " + " | ".join(_cell(cells[family, exporter]) for exporter in exporters) + " |"


def _cell(results: Sequence[Result]) -> str:
    if not results:
        return ""
    verdicts = Counter(result.verdict for result in results)
    text = f"{verdicts['right']}/{len(results)}"
    return " ".join([text, *(f"{verdicts[verdict]}{mark}" for verdict, mark in MARKS.items() if verdicts[verdict])])


def _declined(results: Sequence[Result]) -> Iterator[str]:
    yield "| model | exit | what is said |"
    yield "| --- | --- | --- |"
    for result in results:
        if result.expected == "refuse":
            said = "injected, and right by the stored logits" if result.verdict == "right" else _said(result)
            yield f"| {result.name} | {result.exit_code or ''} | {said} |"


def _said(result: Result) -> str:
    """Return a message in one cell, without the folder that the model happened to lie in."""
    message = re.sub(r"`[^`]*/([^`/]+/[^`/]+)/(model\.onnx[^`]*)`", r"`\2`", result.reason.partition(": ")[2])
    return message.replace("|", "\\|")
