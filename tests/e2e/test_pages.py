"""The commands of docs/coordinator.md, docs/hospital.md and docs/egress.md, run in the order in which two people would.

Paths and names of the pages are those of a real installation; here they are moved into the test's folder, and the
coordinator's name to localhost. A command is taken from its page by its beginning, and at the end each page has none
left: a page that gains a command, or changes one, changes this story.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.client.hospitals import CONFIGS
from tests.server.hospitals import wait_until
from tests.server.processes import ROOT, free_port

pytestmark = pytest.mark.full

PAGES = ("README.md", "docs/coordinator.md", "docs/hospital.md", "docs/egress.md")
ELSEWHERE = ("simulate run", "simulate sweep", "pip install")  # run by .ci/run and .ci/full
ROUNDS = 40


def shell_lines(page: str) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not any(one in line for one in ELSEWHERE)]


@dataclass
class Machine:
    """Both people's machines in one folder."""

    root: Path
    left: dict[str, list[str]] = field(default_factory=lambda: {page: shell_lines(page) for page in PAGES})
    port: int = field(default_factory=free_port)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("bin", "coordinator", "etc", "srv", "var", "mnt"):
            (self.root / name).mkdir()
        script = self.root / "bin" / "wardround"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m wardround "$@"\n')
        script.chmod(0o755)

    def here(self, text: str) -> str:
        """A page's text with its places moved here."""
        places = {
            **{place: str(self.root) + place for place in ("/etc/wardround", "/srv/wardround", "/var/lib", "/mnt")},
            "coordinator.example.org:8643": f"localhost:{self.port}",
            "coordinator.example.org": "localhost",
        }
        return re.sub("|".join(map(re.escape, places)), lambda found: places[found.group()], text)

    def take(self, beginning: str) -> str:
        """The one command of the pages that begins so, moved here; the pages agree on it."""
        found = {line for lines in self.left.values() for line in lines if re.fullmatch(beginning, line)}
        assert len(found) == 1, f"{beginning}: {found}"
        for lines in self.left.values():
            lines[:] = [line for line in lines if line not in found]
        return self.here(found.pop())

    def environment(self) -> dict[str, str]:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def run(self, beginning: str, said: str = "", status: int = 0, again: str | None = None) -> str:
        """Run a page's command (or `again`, one from before) to its end, answering its question with `said`."""
        done = subprocess.run(
            again or self.take(beginning),
            shell=True,
            cwd=self.root / "coordinator",
            env=self.environment(),
            input=said,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, command: str, name: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on; what it says is in `name`.out."""
        with (self.root / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                f"exec {command}",
                shell=True,
                cwd=self.root / "coordinator",
                env=self.environment(),
                stdout=out,
                stderr=out,
            )
        self.processes.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.root / f"{name}.out").read_text()

    def rounds(self) -> int:
        """How many rounds are done."""
        metrics = self.root / "coordinator" / "demo-study" / "state" / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@contextmanager
def machine(root: Path) -> Iterator[Machine]:
    made = Machine(root)
    try:
        yield made
    finally:
        for process in made.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def write_examples(m: Machine, records: Path) -> None:
    """configs/demo.yaml as a smaller study, and the hospital's records and site file, from the shipped example."""
    terms = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    terms["model"] = {"cell": "gru", "hidden": 4, "embedding": 3}
    terms["training"] |= {"rounds": ROUNDS}
    terms |= {"sites": {"north": {"declared_patients": 80}}, "quorum": 1, "features": "features/synthetic.yaml"}
    shutil.copytree(CONFIGS / "features", m.root / "coordinator" / "configs" / "features")
    (m.root / "coordinator" / "configs" / "demo.yaml").write_text(yaml.safe_dump(terms))
    etc = Path(m.here("/etc/wardround"))
    etc.mkdir(parents=True)
    shutil.copytree(records, m.here("/srv/wardround/meds"))
    Path(m.here("/srv/wardround/optouts.csv")).write_text("subject_id\n")
    Path(m.here("/mnt/other-disk")).mkdir(parents=True)
    Path(m.here("/var/lib")).mkdir(parents=True)
    site = (CONFIGS / "sites" / "north.yaml").read_text()
    for old, new in {
        "../demo.yaml": "study.yaml",
        "min_patients: 500": "min_patients: 50",
        "# exclude:": "exclude:",
        "# anchor:": "anchor:",
    }.items():
        assert old in site
        site = site.replace(old, new)
    (etc / "site.yaml").write_text(m.here(site))


def test_the_commands_of_the_pages_run(cohort: dict[str, Path], tmp_path: Path) -> None:
    """From init to leaving, with a crash, a renewed certificate and a ledger that was put back."""
    with machine(tmp_path) as m:
        write_examples(m, cohort["north"])
        coordinator, etc = m.root / "coordinator", Path(m.here("/etc/wardround"))
        state = Path(m.here("/var/lib/wardround"))

        said = m.run("wardround server init .*--study .*")
        authority = found("authority (.*?)   ", said)
        server_terms = yaml.safe_load((coordinator / "demo-study" / "server.yaml").read_text())
        server_terms |= {"port": m.port, "host": "127.0.0.1"}
        (coordinator / "demo-study" / "server.yaml").write_text(yaml.safe_dump(server_terms))
        for name in ("study.yaml", "ca.crt"):
            shutil.copy(coordinator / "demo-study" / name, etc / name)

        assert "these are counts of your patients" in m.run("wardround client check .*").lower()
        said = m.run("wardround client keygen .*")
        shutil.copy(state / "key.pub", coordinator / "north.pub")
        assert found("fingerprint: (.*)", said) in m.run("wardround server admit .*")

        server = m.start(m.take("wardround server run .*yaml"), "server")
        wait_until(lambda: "listening on" in m.said("server"))
        said = m.run("wardround client enrol .*", "y\n")
        assert authority in said
        assert "Enrolled." in said
        assert "Nothing was sent" in m.run("wardround client run .* --dry-run .*")

        run = m.take("wardround client run .*yaml")
        client = m.start(run, "client")
        wait_until(lambda: m.rounds() >= 2, 120)
        ended(client)
        m.run("tar .*")
        client = m.start(run, "client")
        assert "study demo" in m.run("wardround server status .*")
        wait_until(lambda: m.said("client").count("connected to") >= 2, 120)
        assert m.rounds() < ROUNDS
        server.kill()
        server.wait()
        assert "valid for 397 days" in m.run("wardround server init .* --renew-certificate")
        server = m.start(m.take("wardround server run .* --resume"), "server")
        assert server.wait(300) == 0, m.said("server")
        assert f"finished: {ROUNDS} rounds" in m.said("server")
        ended(client)

        said = m.run("wardround client budget .*yaml")
        assert f"{ROUNDS}/{ROUNDS + 4}" in said
        put_back(coordinator / "wardround-state.tar.gz", state, tmp_path)
        assert "this is an older copy" in m.run("", status=2, again=run)
        said = m.run("wardround client budget .* --accept-restore", "y\n")
        assert "entries were lost and accepted as lost 1 time(s)" in said
        assert "Left study demo." in m.run("wardround client leave .*", "y\n")
        assert m.left == {page: [] for page in PAGES}


def ended(process: subprocess.Popen[bytes]) -> None:
    """Ask a client to end, as systemd would."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def put_back(copy: Path, state: Path, place: Path) -> None:
    """Exchange the ledger for the one of the copy."""
    with tarfile.open(copy) as archive:
        archive.extractall(place / "old", filter="data")
    for path in state.glob("ledger.db*"):
        path.unlink()
    for path in (place / "old" / "wardround").glob("ledger.db*"):
        shutil.copy(path, state)
    assert (state / "ledger.db").exists()


def found(pattern: str, text: str) -> str:
    """The one place of a text that a pattern names."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match.group(1).strip()
