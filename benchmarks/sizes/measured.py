"""Runs one command and prints, as JSON, what it took: `python -I -S measured.py COMMAND...`.

A separate and small script: a child's peak memory starts at that of the process which made it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time


def main(command: list[str]) -> dict[str, object]:
    """Return seconds by the clock and of the processor, bytes at the peak, read and from disk, and how it ended."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - start
        with open(f"/proc/{process.pid}/io", encoding="ascii") as lines:  # a zombie still has its counters
            counters = {name: int(value) for name, value in (line.split(": ") for line in lines)}
        _, status, usage = os.wait4(process.pid, 0)
        said.seek(0)
        words = said.read().decode(errors="replace").strip()
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "asked_bytes": counters["rchar"],
        "disk_bytes": counters["read_bytes"],
        "exit_code": os.waitstatus_to_exitcode(status),
        "said": words[-2000:],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
