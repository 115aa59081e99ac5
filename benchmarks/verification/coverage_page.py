"""Write docs/coverage.md: the result of every model of a corpus."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from verification.verdicts import VERDICTS, Result

COMMAND = "python benchmarks/coverage.py ../shared/corpus --markdown docs/coverage.md"
MARKS = {"refused": "r", "not runnable": "n", "wrong": "!", "crashed": "!", "hung": "!"}


def as_markdown(results: Sequence[Result]) -> str:
    """Return the page: counts, refused models with reasons, families by exporter, and models that must be refused."""
    lines = [
        "# Coverage",
        "",
        "Every model of a corpus of tiny exports is injected, run in one call, token by token and in uneven chunks,",
        "with left padding, and compared with the logits of its source framework; see the",
        "[benchmarks](../benchmarks/README.md#coveragepy). [Errors](errors.md) explains the codes. This page is",
        "written by",
        "",
        '```sh skip="needs the model corpus"',
        COMMAND,
        "```",
        "",
        *_counts(results),
        "",
        "## Refused, although a cache would be right",
        "",
        *_refused(results),
        "",
        "## Families and exporters",
        "",
        *_families(results),
        "",
        "## Must be refused",
        "",
        *_declined(results),
    ]
    return "\n".join(lines) + "\n"


def _counts(results: Sequence[Result]) -> Iterator[str]:
    shown = [verdict for verdict in VERDICTS if verdict in ("right", "refused") or _any(results, verdict)]
    yield "| a cache would be | models | " + " | ".join(shown) + " |"
    yield "| --- | --- |" + " --- |" * len(shown)
    for expected, words in (("inject", "right"), ("either", "right, with special care"), ("refuse", "wrong")):
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
        model = f"**{result.family}**, {result.exporter} (`{result.group}/{result.name}`)"
        yield f"- {model}: {result.code} {_message(result)}"


def _families(results: Sequence[Result]) -> Iterator[str]:
    entries = [result for result in results if result.expected != "refuse"]
    exporters = [name for name, _ in Counter(result.exporter for result in entries).most_common()]
    cells: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in entries:
        cells[result.family, result.exporter].append(result)
    yield "Injected and right, out of all; `r` refused, `n` injected but not runnable in onnxruntime, `!` wrong."
    yield ""
    yield "| family | " + " | ".join(exporters) + " |"
    yield "| --- |" + " --- |" * len(exporters)
    for family in sorted({result.family for result in entries}):
        yield f"| {family} | " + " | ".join(_cell(cells[family, exporter]) for exporter in exporters) + " |"


def _cell(results: Sequence[Result]) -> str:
    if not results:
        return ""
    verdicts = Counter(result.verdict for result in results)
    text = f"{verdicts['right']}/{len(results)}"
    return " ".join([text, *(f"{verdicts[verdict]}{mark}" for verdict, mark in MARKS.items() if verdicts[verdict])])


def _declined(results: Sequence[Result]) -> Iterator[str]:
    yield "| model | code | message |"
    yield "| --- | --- | --- |"
    for result in results:
        if result.expected == "refuse":
            message = "injected, and right by the stored logits" if result.verdict == "right" else _message(result)
            yield f"| {result.name} | {result.code} | {message} |"


def _message(result: Result) -> str:
    """Return the message for a table cell, without the path of the folder."""
    message = re.sub(r"`[^`]*/([^`/]+/[^`/]+)/(model\.onnx[^`]*)`", r"`\2`", result.reason.partition(": ")[2])
    return message.replace("|", "\\|")
