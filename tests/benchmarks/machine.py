"""The line that stands above every measured table: when, and on which machine, how busy."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name (Linux), or what Python knows."""
    info = Path("/proc/cpuinfo")
    rows = [row.partition(":") for row in info.read_text().splitlines()] if info.exists() else []
    names = (value.strip() for key, _, value in rows if key.strip() == "model name")
    return next(names, platform.processor() or "unknown processor")


def conditions() -> str:
    """Date, processor, CPUs, load of the last minute, Python."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{datetime.date.today().isoformat()}, {processor()} ({os.cpu_count()} CPUs, load {load}), "
        f"Python {platform.python_version()}"
    )
