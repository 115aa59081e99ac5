"""Run a client on the target folder of one model, in an isolated folder, and compare its tokens."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cases import Case, expected_tokens
from environments import Client

import kvsurgeon
from kvsurgeon.errors import KvsurgeonError, UnsupportedError
from kvsurgeon.io import find_model
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.opset.lower_opset import LowerOpset
from kvsurgeon.targets import TARGETS

DECODER = "decoder_model.onnx"  # beside the encoder or the embedding, as exporters call it
Cases = Sequence[tuple[Case, list[list[int]] | None]]  # with the expected tokens; None to compute them


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one model.

    Attributes:
        model: Name of the model.
        verdict: "equal", "different", "rejected", "failed", or "unsupported" if the client fails on the original too.
        details: The reason.
    """

    model: str
    verdict: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:9} {self.model:44} {self.details}".rstrip()


def run_isolated(client: Client, call: list[str], home: Path, model: Path, cases: Cases, *, verify: bool) -> Outcome:
    """Write the folder of the target, run the client in a copy of it, and compare its tokens.

    If they differ and the client supports models without a cache, it runs the original too.
    """
    name = model.stem if model.suffix else "/".join(model.parts[-2:])
    with tempfile.TemporaryDirectory(prefix="kvsurgeon-client-") as scratch:
        source = _copy(model, Path(scratch) / "source")
        source = source / DECODER if client.encoder or client.embedding else source
        expected = [tokens or expected_tokens(find_model(source), case) for case, tokens in cases]
        isolated = Path(scratch) / "isolated"
        try:
            _build(client, source, isolated, verify=verify)
        except UnsupportedError as error:
            return Outcome(model=name, verdict="rejected", details=str(error))
        except KvsurgeonError as error:
            return Outcome(model=name, verdict="failed", details=f"inject: {error}")
        found = _compare([*call, str(isolated), *client.arguments], home, cases, expected)
        if found.verdict != "equal" and client.uncached is not None:
            original = _original(client, model, Path(scratch) / "original")
            uncached = [*call, str(original), *client.arguments, client.uncached]
            without = _compare(uncached, home, cases, expected)
            if without.verdict != "equal":
                details = f"also without a cache: {without.verdict}: {without.details}"
                found = Outcome(model=name, verdict="unsupported", details=details)
    return replace(found, model=name)


def _compare(command: list[str], home: Path, cases: Cases, expected: Sequence[list[list[int]]]) -> Outcome:
    ran = _run(command, home, cases, _unused(expected))
    if ran.returncode:
        return Outcome(model="", verdict="failed", details=_last_lines(ran.stderr))
    found = json.loads(ran.stdout.splitlines()[-1])["answers"]
    wrong = [
        f"{case.name}: expected {want}, found {have}"
        for (case, _), want, have in zip(cases, expected, found, strict=True)
        if want != have
    ]
    tokens = sum(len(row) for rows in expected for row in rows)
    details = "; ".join(wrong) or f"{len(cases)} cases, {tokens} tokens"
    return Outcome(model="", verdict="different" if wrong else "equal", details=details)


def _original(client: Client, model: Path, folder: Path) -> Path:
    """Return a folder with a copy of the original, in an opset that the client loads."""
    copy = find_model(_copy(model, folder))
    opset = TARGETS.find(client.target).load().max_opset
    if opset is not None:
        subject = Subject.of(copy)
        if isinstance(LowerOpset(opset=opset).apply(subject), Changed):
            kvsurgeon.save(subject.model, copy)
    return copy.parent


def _copy(model: Path, folder: Path) -> Path:
    """Return a copy of a file or folder."""
    if model.is_dir():
        return Path(shutil.copytree(model, folder))
    folder.mkdir()
    return Path(shutil.copy(model, folder))


def _build(client: Client, source: Path, isolated: Path, *, verify: bool) -> None:
    """Write the folder of the target, copy it, and delete everything else, so that links out of it are broken."""
    built = isolated.with_name("built")
    kvsurgeon.inject(source, built, target=client.target, verify=verify)
    shutil.copytree(built, isolated, symlinks=True)
    shutil.rmtree(built)
    shutil.rmtree(source if source.is_dir() else source.parent)


def _run(command: list[str], home: Path, cases: Cases, unused: int) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [*_without_network(), *command],
        input=json.dumps({"cases": [case.request() for case, _ in cases], "unused": unused}),
        capture_output=True,
        text=True,
        errors="replace",
        cwd=home,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return the prefix of a command that runs without a network; empty if the system does not support it."""
    prefix = ("unshare", "--net", "--map-root-user")
    works = shutil.which(prefix[0]) and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if works else ()


def _unused(expected: Sequence[list[list[int]]]) -> int:
    """Return a token that is not expected in any case."""
    used = {token for rows in expected for row in rows for token in row}
    return next(token for token in range(len(used) + 1) if token not in used)


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[:400]
