"""A study on this machine as it is run for real: one server, its hospitals, each a process of the command line.

Whatever a person would do is done by `wardround ...` in a process of its own: folders, keys, roster, enrolment, runs.
The exception is a file that the manual says to edit (server.yaml, the site file). Processes get an empty home, an
empty folder for temporary files and an empty working directory, so that what they leave behind is seen.

Waits look at a condition and are bounded; processes are ended by their own id, and none is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300.0  # the most that anything here may take
WARDROUND = ("-m", "wardround")


def wait_until(holds: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Wait for a condition. Raises TimeoutError, naming it."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        threading.Event().wait(0.02)


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def write_study(
    path: Path, declared: Mapping[str, int], base: Path = ROOT / "configs" / "demo.yaml", **by: Any
) -> Path:
    """A study file: `base`, with these sites and changes; a mapping changes keys of a section."""
    terms = yaml.safe_load(base.read_text())
    if isinstance(terms["features"], str):
        terms["features"] = str(base.parent / terms["features"])
    terms["sites"] = {site: {"declared_patients": patients} for site, patients in declared.items()}
    for key, value in by.items():
        terms[key] = {**terms.get(key, {}), **value} if isinstance(value, dict) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(terms, sort_keys=False))
    return path


@dataclass(frozen=True)
class May:
    """What a process may do beside reading files; tests/e2e/watched.py compares it with what it did.

    Attributes:
        write: folders in which it may write.
        call: port of this machine that it may connect to.
        listen: port of this machine that it may listen on.
    """

    write: tuple[Path, ...] = ()
    call: int | None = None
    listen: int | None = None


class Running:
    """A process that was started, what it may do, and what it says on standard output and error."""

    def __init__(
        self, command: Sequence[str], output: Path, folder: Path, environment: Mapping[str, str], may: May
    ) -> None:
        self.output, self.may = output, may
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    @property
    def name(self) -> str:
        """Its number in the deployment, and what it is."""
        return self.output.stem

    @property
    def text(self) -> str:
        """All that it has said so far."""
        return self.output.read_text()

    def wait_for(self, words: str, seconds: float = SECONDS) -> None:
        """Wait until it has said `words`; an end before that is a failure."""

        def said() -> bool:
            ended = self.process.poll() is not None
            if words in self.text:
                return True
            assert not ended, f"ended with {self.process.returncode} before `{words}`:\n{self.text}"
            return False

        wait_until(said, f"`{words}` in {self.output.name}", seconds)

    def finish(self, status: int = 0, seconds: float = SECONDS) -> str:
        """Wait for its own end with this exit status; returns what it said."""
        found = self.process.wait(timeout=seconds)
        assert found == status, f"{self.output.name} ended with {found}:\n{self.text}"
        return self.text

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end and wait; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=SECONDS)


@dataclass
class Deployment:
    """The folders of everybody who takes part, and the processes that were started.

    Args:
        root: new folder for all of it.
        watch: folder of a `sitecustomize.py` that every process loads first; it gets the process's own folder for
            notes as the variable NOTES.
        environment: further variables of every process.
    """

    root: Path
    watch: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    started: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("home", "tmp", "cwd", "said", "notes"):
            (self.root / name).mkdir(parents=True)

    def start(
        self, name: str, *arguments: str | Path, how: Sequence[str | Path] = WARDROUND, may: May | None = None
    ) -> Running:
        """Start `python -m wardround ARGUMENTS`, or `python HOW ARGUMENTS`."""
        label = f"{len(self.started):02d}-{name}"
        notes = self.root / "notes" / label
        notes.mkdir()
        paths = [str(self.watch)] if self.watch else []
        environment = {
            **os.environ,
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "NOTES": str(notes),
            **self.environment,
        }
        command = [sys.executable, *map(str, (*how, *arguments))]
        said = self.root / "said" / f"{label}.txt"
        self.started.append(Running(command, said, self.root / "cwd", environment, may or May()))
        return self.started[-1]

    def command(self, *arguments: str | Path, may: May | None = None) -> str:
        """Run a command to its end; returns what it said."""
        return self.start("-".join(map(str, arguments[:2])), *arguments, may=may).finish()

    def left_behind(self) -> list[Path]:
        """Files in the home, temporary and working folders of the processes."""
        return [path for name in ("home", "tmp", "cwd") for path in sorted((self.root / name).rglob("*"))]

    def close(self) -> None:
        """End whatever still runs."""
        for running in self.started:
            if running.process.poll() is None:
                running.process.kill()
                running.process.wait()


@contextmanager
def deployed(root: Path, **settings: Any) -> Iterator[Deployment]:
    """A deployment whose processes are gone at the end of the block."""
    deployment = Deployment(root, **settings)
    try:
        yield deployment
    finally:
        deployment.close()


class Server:
    """The coordinator: `wardround server init`, then admit, run and status.

    Args:
        deployment: where.
        study: study file.
        terms: changes of server.yaml.
    """

    def __init__(self, deployment: Deployment, study: Path, name: str = "server", **terms: Any) -> None:
        self.deployment, self.name = deployment, name
        self.path, self.port = deployment.root / name, free_port()
        self._may = May(write=(self.path,))
        options = ("--study", study, "--name", "localhost", "--port", str(self.port))
        deployment.command("server", "init", self.path, *options, may=self._may)
        written = yaml.safe_load((self.path / "server.yaml").read_text())
        (self.path / "server.yaml").write_text(yaml.safe_dump(written | {"host": "127.0.0.1", **terms}))

    @property
    def study(self) -> Path:
        """The study file that hospitals get."""
        return self.path / "study.yaml"

    @property
    def address(self) -> str:
        """What hospitals dial."""
        return f"localhost:{self.port}"

    def admit(self, hospital: Hospital) -> None:
        """Put the hospital's key on the roster."""
        key = hospital.state / "key.pub"
        self.deployment.command("server", "admit", self.path, hospital.site, key, may=self._may)

    def run(self, *arguments: str) -> Running:
        """Start the server and wait until it listens."""
        may = replace(self._may, listen=self.port)
        running = self.deployment.start(f"{self.name}-run", "server", "run", self.study, *arguments, may=may)
        running.wait_for("listening on")
        return running

    def status(self) -> dict[str, Any]:
        """`wardround server status --json`."""
        said = self.deployment.command("server", "status", self.path, "--json", may=self._may)
        found: dict[str, Any] = json.loads(said)
        return found

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.path / "state" / "metrics.jsonl").read_text().splitlines()]

    @property
    def weights(self) -> Path:
        """The final weights."""
        return self.path / "weights.safetensors"


class Hospital:
    """A hospital: its folder, and `wardround client` keygen, enrol, run, budget.

    Args:
        deployment: where.
        site: its name in studies.
        records: its MEDS directory.
        folder: name of its folder here; its name if absent.
        server: whose study the site file names.
        terms: changes of the site file.
    """

    def __init__(
        self, deployment: Deployment, site: str, records: Path, server: Server, *, folder: str = "", **terms: Any
    ) -> None:
        self.deployment, self.site = deployment, site
        self.path = deployment.root / (folder or site)
        self.path.mkdir()
        self.file, self.state = self.path / "site.yaml", self.path / "state"
        self.terms: dict[str, Any] = {
            "version": 1,
            "site": site,
            "records": str(records),
            "policy": {"max_epsilon": 3.0, "delta": 1e-5},
            "state": "state",
        } | terms
        self.take_up(server)

    def take_up(self, server: Server) -> None:
        """Make the site file name this server and its study."""
        place = {"address": server.address, "ca": str(server.path / "ca.crt")}
        self.file.write_text(yaml.safe_dump({"study": str(server.study), "server": place, **self.terms}))
        self._may, self._may_call = May(write=(self.state,)), May(write=(self.state,), call=server.port)

    def keygen(self) -> str:
        """Make the key."""
        return self.deployment.command("client", "keygen", self.file, may=self._may)

    def enrol(self) -> Running:
        """Start to enrol, with a yes."""
        return self.deployment.start(f"{self.site}-enrol", "client", "enrol", self.file, "--yes", may=self._may_call)

    def run(self, *arguments: str | Path, how: Sequence[str | Path] = (*WARDROUND, "client", "run")) -> Running:
        """Start to take part: `python HOW SITE.yaml ARGUMENTS`."""
        return self.deployment.start(f"{self.site}-run", self.file, *arguments, how=how, may=self._may_call)

    def budget(self) -> Running:
        """Start `wardround client budget --json`."""
        return self.deployment.start(f"{self.site}-budget", "client", "budget", self.file, "--json", may=self._may)

    @property
    def log(self) -> str:
        """client.log."""
        return (self.state / "client.log").read_text()


def enrol(hospitals: Iterable[Hospital]) -> None:
    """All of them say yes, at the same time."""
    for enrolling in [hospital.enrol() for hospital in hospitals]:
        assert "Enrolled." in enrolling.finish()


def budgets(hospitals: Iterable[Hospital]) -> dict[str, dict[str, Any]]:
    """Each site's budget as `wardround client budget --json` tells it."""
    asked = {hospital.site: hospital.budget() for hospital in hospitals}
    return {site: json.loads(running.finish()) for site, running in asked.items()}


def open_to_others(folder: Path) -> list[Path]:
    """What in and under `folder`, itself included, is no 0700 folder and no 0600 file."""
    return [
        path
        for path in (folder, *sorted(folder.rglob("*")))
        if path.lstat().st_mode & 0o7777 != (0o700 if path.is_dir() else 0o600)
    ]
