"""Faults that a test can bring about on one machine: a disk of its own, full or read-only, and a clock that is off."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long offset(void) {
    long seconds = 0;
    const char *path = getenv("CLOCK_OFFSET");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += offset();
    return status;
}
time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict into, void *restrict zone) {
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    into->tv_sec = now.tv_sec;
    into->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


def told(what: str, began: float) -> None:
    """A line for docs/faults-network.md: what was over, and seconds since `began` (monotonic)."""
    print(f"fault: {what}: {time.monotonic() - began:.1f} s", file=sys.__stdout__, flush=True)


@contextmanager
def disk(path: Path, kilobytes: int, *, read_only: bool = False) -> Iterator[Path]:
    """A file system of its own at `path`, which is made; `read_only`: what is under `path` now, not to be written.

    Skips the test where nothing may be mounted.
    """
    path.mkdir(exist_ok=True)
    how = ["--bind", str(path)] if read_only else ["-t", "tmpfs", "-o", f"size={kilobytes}k,mode=700", "tmpfs"]
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", *how, str(path)], stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("this user may not mount a file system")
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(path)], check=True)
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def full(path: Path) -> Iterator[None]:
    """No byte is left on the file system of the folder `path`, until the end of the block."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    try:
        yield
    finally:
        filler.unlink()


class Clock:
    """A clock for processes started with `environment`: off by so many seconds, from one moment to the next.

    TLS, Python, and SQLite in such a process ask it. Monotonic time is not touched. Skips the test without a compiler.
    """

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None or sys.platform != "linux":
            pytest.skip("needs a C compiler on Linux, to stand between a process and its clock")
        source, library, self._offset = folder / "clock.c", folder / "clock.so", folder / "offset"
        source.write_text(CLOCK)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._offset)}
        self.set(0)

    def set(self, seconds: int) -> None:
        """Be off by this much from now on."""
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(str(seconds))
        os.replace(fresh, self._offset)
