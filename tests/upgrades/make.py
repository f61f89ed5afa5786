"""Writes `tests/upgrades/v1`: what the first programs with a ledger, a state folder and a server's folder left on disk.

    python -m tests.upgrades.make

Each piece is written by the code of the commit that introduced its format, in a worktree of its own; so this needs the
repository's history, which the tests do not. Keys are left out. Made once: salts and times differ from run to run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "v1"

LEDGER = """
import sys
from pathlib import Path
from client.ledger_file import SqliteLedger
from common.privacy.plan import Plan
out = Path(sys.argv[1])
with SqliteLedger(out / "ledger.db", 3.0, 1e-5, anchor=out / "anchor.json") as ledger:
    ledger.open_cohort("all", [1, 2, 3])
    ledger.admit("5" * 64, Plan(0.1, 4.0, 2.0, 1e-5, 10, 3))
    for number in (1, 2, 3):
        ledger.release(ledger.attempt("5" * 64, number, 1, "a" * 64), b"update %d" % number)
    ledger.attempt("5" * 64, 4, 1, "a" * 64)
"""

STATE = """
import sys
from pathlib import Path
from client.enrolment import Enrolment
from client.state import StateFolder
state = StateFolder(Path(sys.argv[1]) / "state", create=True)
state.write_json("node.json", {"node": 7, "server": "localhost:8643"})
Enrolment(study="5" * 64, name="demo", site="north", declared_patients=80, policy="6" * 64,
          authority="", certificate="", time="2026-11-24T12:00:00+00:00").write(state)
"""

SERVER = """
import shutil, sys
from pathlib import Path
import numpy as np
from common.study import load_study
from server.checkpoint import Checkpoint, save
from server.folder import create
from server.optimizer import AdamState
from server.progress import append
from server.rounds import RoundRecord
out = Path(sys.argv[1]) / "server"
study = load_study(Path("configs/demo.yaml"))
folder = create(out, study, ("localhost",))
shutil.rmtree(out / "private")
(out / "ca.crt").unlink()
weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
moments = {name: array.astype(np.float64) / 3 for name, array in weights.items()}
save(folder.checkpoint, Checkpoint(2, weights, AdamState(2, moments, moments), {"north": "b" * 64}), study.digest())
for number in (1, 2):
    append(folder.metrics, RoundRecord(number, ("north",), {"east": "no reply"}, weights, 1.5), counted=True)
"""

PIECES = {"a50527d": LEDGER, "2da08c1": STATE, "a0a09ab": SERVER}  # commit -> what its code writes


def main() -> None:
    """Write all pieces."""
    HERE.mkdir(exist_ok=True)
    for commit, script in PIECES.items():
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name) / "tree"
            subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, check=True)
            try:
                environment = {**os.environ, "PYTHONPATH": str(tree)}
                subprocess.run([sys.executable, "-c", script, str(HERE)], cwd=tree, env=environment, check=True)
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    for unwanted in ("ledger.db.lock", "state/flower"):
        (HERE / unwanted).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
