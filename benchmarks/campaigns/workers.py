"""Runs tasks in processes that are replaced if they hang or die."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

HUNG, DIED = "hung", "died"
Run = Callable[[Any], Any]


@dataclass(kw_only=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    left: list[Any]  # tasks
    since: float  # when the last one began


def run_all(run: Run, tasks: Sequence[Any], *, jobs: int, seconds: float) -> Iterator[tuple[Any, Any]]:
    """Yield each task with its result, or with `HUNG` or `DIED`.

    Args:
        run: Called in another process with a task.
        tasks: What to run.
        jobs: Number of processes.
        seconds: Time allowed for a task.
    """
    workers = [_begin(run, list(part)) for part in (tasks[first::jobs] for first in range(jobs)) if part]
    while workers:
        ready = wait([worker.connection for worker in workers], timeout=1)
        for worker in list(workers):
            result = None
            if worker.connection in ready:
                result = _received(worker)
            elif time.monotonic() - worker.since > seconds:
                result = HUNG
            if result is None:
                continue
            yield worker.left.pop(0), result
            worker.since = time.monotonic()
            if result in (HUNG, DIED) or not worker.left:
                worker.process.kill()
                worker.process.join()
                workers.remove(worker)
                if worker.left:
                    workers.append(_begin(run, worker.left))


def _received(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except EOFError:
        return DIED


def _begin(run: Run, left: list[Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run, left, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process=process, connection=mine, left=left, since=time.monotonic())


def _work(run: Run, tasks: Sequence[Any], connection: Connection) -> None:
    for task in tasks:
        connection.send(run(task))
