"""One model, its target folder alone in an empty place, and what the client makes of it there."""

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

from cases import Case, answer
from environments import Client

import kvsurgeon
from kvsurgeon.errors import KvsurgeonError, UnsupportedError
from kvsurgeon.io import find_model
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.opset.lower_opset import LowerOpset
from kvsurgeon.targets import TARGETS

Asked = Sequence[tuple[Case, list[list[int]] | None]]  # with what is expected, where that is known


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out of one model: "equal", "different", "refused", "failed" or "unfit", and why.

    Unfit is a model that the client fails on, or answers otherwise, before anything was done to it.
    """

    model: str
    verdict: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:9} {self.model:44} {self.details}".rstrip()


def outcome(client: Client, call: list[str], home: Path, model: Path, cases: Asked, *, judged: bool) -> Outcome:
    """Write the target's folder, run the client where nothing else is, and compare its tokens.

    Where they are not equal, and the client runs models without a cache, it is asked the same of the original.
    """
    name = model.stem if model.suffix else "/".join(model.parts[-2:])
    with tempfile.TemporaryDirectory(prefix="kvsurgeon-client-") as scratch:
        source = _copied(model, Path(scratch) / "source")
        expected = [said or answer(find_model(source), case) for case, said in cases]
        alone = Path(scratch) / "alone"
        try:
            _moved(client, source, alone, judged=judged)
        except UnsupportedError as error:
            return Outcome(model=name, verdict="refused", details=str(error))
        except KvsurgeonError as error:
            return Outcome(model=name, verdict="failed", details=f"inject: {error}")
        found = _compared([*call, str(alone), *client.arguments], home, cases, expected)
        if found.verdict != "equal" and client.plain is not None:
            original = _plain(client, model, Path(scratch) / "original")
            plain = [*call, str(original), *client.arguments, client.plain]
            without = _compared(plain, home, cases, expected)
            if without.verdict != "equal":
                details = f"without a cache too: {without.verdict}: {without.details}"
                found = Outcome(model=name, verdict="unfit", details=details)
    return replace(found, model=name)


def _compared(command: list[str], home: Path, cases: Asked, expected: Sequence[list[list[int]]]) -> Outcome:
    ran = _run(command, home, cases, _unused(expected))
    if ran.returncode:
        return Outcome(model="", verdict="failed", details=_last_words(ran.stderr))
    found = json.loads(ran.stdout.splitlines()[-1])["answers"]
    wrong = [
        f"{case.name}: expected {want}, found {have}"
        for (case, _), want, have in zip(cases, expected, found, strict=True)
        if want != have
    ]
    tokens = sum(len(row) for rows in expected for row in rows)
    details = "; ".join(wrong) or f"{len(cases)} cases, {tokens} tokens"
    return Outcome(model="", verdict="different" if wrong else "equal", details=details)


def _plain(client: Client, model: Path, folder: Path) -> Path:
    """Return a folder with a copy of the original, of an opset that the client reads, and nothing else done to it."""
    copy = find_model(_copied(model, folder))
    opset = TARGETS.find(client.target).load().opset
    if opset is not None:
        subject = Subject.of(copy)
        if isinstance(LowerOpset(opset=opset).apply(subject), Changed):
            kvsurgeon.save(subject.model, copy)
    return copy.parent


def _copied(model: Path, folder: Path) -> Path:
    """Return a copy of a file, or of a folder, that can be taken away."""
    if model.is_dir():
        return Path(shutil.copytree(model, folder))
    folder.mkdir()
    return Path(shutil.copy(model, folder))


def _moved(client: Client, source: Path, alone: Path, *, judged: bool) -> None:
    """Write the target's folder, and leave a copy of nothing but it; links out of it lead nowhere then."""
    made = alone.with_name("made")
    kvsurgeon.inject(source, made, target=client.target, verify=judged)
    shutil.copytree(made, alone, symlinks=True)
    shutil.rmtree(made)
    shutil.rmtree(source if source.is_dir() else source.parent)


def _run(command: list[str], home: Path, cases: Asked, unused: int) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [*_without_network(), *command],
        input=json.dumps({"cases": [case.asked() for case, _ in cases], "unused": unused}),
        capture_output=True,
        text=True,
        errors="replace",
        cwd=home,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )


@functools.cache
def _without_network() -> tuple[str, ...]:
    """Return what a command is put behind to have no network; nothing where that cannot be had."""
    alone = ("unshare", "--net", "--map-root-user")
    there = shutil.which(alone[0]) and subprocess.run([*alone, "true"], capture_output=True).returncode == 0
    return alone if there else ()


def _unused(expected: Sequence[list[list[int]]]) -> int:
    """Return a token that is in no answer."""
    said = {token for rows in expected for row in rows for token in row}
    return next(token for token in range(len(said) + 1) if token not in said)


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[:400]
