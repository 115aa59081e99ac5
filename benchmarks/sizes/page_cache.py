"""Measure how much of a file has been read: whatever reads or maps a page leaves it in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

LIBC = ctypes.CDLL(None, use_errno=True)
WINDOW = 1 << 30  # bytes looked at in one call


def forget(path: Path) -> None:
    """Drop a file's pages from the cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_cached(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    size = path.stat().st_size
    if not size:
        return 0
    pages = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        for start in range(0, size, WINDOW):
            length = min(WINDOW, size - start)
            present = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
            if LIBC.mincore(ctypes.c_void_p(address + start), ctypes.c_size_t(length), present):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            pages += int(np.count_nonzero(np.frombuffer(present, np.uint8) & 1))
    return pages * mmap.PAGESIZE


def check_gauge(path: Path) -> None:
    """Read one byte in the middle of a file, by a map and by a call, and see that both are noticed.

    Raises:
        RuntimeError: They are not: nothing that this module says can be believed here.
    """
    forget(path)
    if bytes_cached(path):
        raise RuntimeError(f"pages of {path} cannot be dropped from the cache")
    middle = path.stat().st_size // 2
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        _ = mapped[middle]
        by_map = bytes_cached(path)
        os.pread(file.fileno(), 1, middle // 2)
    if not 0 < by_map < bytes_cached(path):
        raise RuntimeError(f"a byte read from {path} does not show in the page cache")
    forget(path)
