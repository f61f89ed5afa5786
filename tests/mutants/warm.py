"""A process that has read the libraries, not the product, and forks for each run of pytest: five seconds saved a run.

    python tests/mutants/warm.py, in the copy; each line of standard input is a JSON list of pytest's arguments

Run as a script, so that neither the product nor its tests are imported before the fork; each child reads them from the
copy as it then is. Answers with the exit code, one line a run; what pytest printed is in `said.txt`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

LIBRARIES = (
    "pytest",
    "hypothesis",
    "numpy",
    "torch",
    "opacus",
    "dp_accounting",
    "flwr.app",
    "flwr.serverapp",
    "scipy.stats",
)


def run(arguments: list[str]) -> int:
    """Pytest's exit code, from a fork of this process."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70  # as sysexits has it, for what pytest itself did not survive
    try:
        with Path("said.txt").open("w", encoding="utf-8") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        code = int(importlib.import_module("pytest").main(arguments))
        sys.stdout.flush()
    except BaseException:  # the child must not go on as its parent would
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # the copy, in place of this script's folder
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)
