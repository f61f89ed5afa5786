"""One study at the coordinator, from an opened folder to the final weights: connection, rounds, files, pauses.

    open the port -> read the study -> for each round: ask, check, average, write the line, write the checkpoint
                  -> if the study has metrics: ask, check, estimate, write

The port opens before the study is read, because pricing its plan takes seconds and sites may connect meanwhile. A
round without quorum pauses the study: the weights stay, and the round is asked for again. A signal ends the server
at its next wait; the round that was on does not count. Metrics have no quorum: who is away at that time is left out,
until `--resume` asks again, which costs no patient anything.
"""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from common.errors import ConfigurationError
from common.provenance import code_digest
from common.records import WIRE_VERSION
from common.weights import to_bytes
from server import evaluation, progress
from server.certificates import RENEW_DAYS, days_left
from server.checkpoint import Checkpoint, load, save
from server.files import held, remove_unfinished, write_atomically
from server.folder import ServerFolder, read_certificate
from server.grid import LOOK, FleetGrid, Presence, StoppedError
from server.participation import QuorumError
from server.public import Tls
from server.rounds import RoundRecord, ask_for_metrics, run
from server.strategy import FederatedAveraging
from server.superlink import SuperLink

log = logging.getLogger("wardround.server")

RETRY, LONGEST_RETRY = 5.0, 600.0  # seconds between tries at a round that sites refuse; doubles
LOOPBACK = ("127.0.0.1", "::1", "localhost")
Tell = Callable[[str], None]


def serve(folder: ServerFolder, *, resume: bool, plaintext: bool = False, tell: Tell = print) -> None:
    """Run the study in `folder` to its end.

    Args:
        resume: go on from the checkpoint of an earlier run; without it, one is an error.
        plaintext: no TLS; the folder must listen on this machine only.
        tell: called with a line for whoever watches.

    Raises:
        StoppedError: SIGTERM or SIGINT; everything that counts is on disk.
        ConfigurationError: the folder, its certificate or its port cannot be used.
    """
    tls = None if plaintext else _checked_tls(folder, tell)
    if plaintext and folder.terms.host not in LOOPBACK:
        raise ConfigurationError(
            f"--plaintext with host {folder.terms.host}: only on this machine, 127.0.0.1 or ::1; change `host` in "
            "server.yaml, or leave the flag out"
        )
    with held(folder.state / "lock", str(folder.path)):
        for written in (folder.checkpoint, folder.state / "now.json", folder.path / "weights.safetensors"):
            remove_unfinished(written)
        start = load(folder.checkpoint, folder.terms.study)  # nobody else writes a newer one meanwhile
        if start.round_number and not resume:
            raise ConfigurationError(
                f"{folder.checkpoint}: round {start.round_number} is done; add --resume to go on from there (sites do "
                "not train a round twice; a study from the beginning needs a new folder and another study name)"
            )
        _Run(folder, start, tls, tell).serve()


class _Run:
    """One process's part of a study."""

    def __init__(self, folder: ServerFolder, start: Checkpoint, tls: Tls | None, tell: Tell) -> None:
        self._folder, self._start, self._tell = folder, start, tell
        self._done, self._retry = start.round_number, RETRY
        listen = (folder.terms.host, folder.terms.port)
        self._link = SuperLink(folder.state / "superlink.db", listen, _health(folder.terms.study), tls)
        self._grid = FleetGrid(self._link, saw=self._saw)
        self._now = progress.Now(folder.state / "now.json")
        self._roster_read: tuple[int, int] | None = None
        self._sites: frozenset[str] | None = None  # the study's, once it is read

    def serve(self) -> None:
        """See `serve`."""
        with _signals(self._grid.stop):
            self._link.start()
            try:
                self._now.show("starting", self._done)
                self._read_roster()
                self._tell(f"listening on {self._folder.terms.host}:{self._link.port}")
                self._rounds()
                self._now.show("finished", self._done)
            except BaseException as error:
                self._now.show("stopped", self._done, "" if isinstance(error, StoppedError) else type(error).__name__)
                raise
            finally:
                self._link.stop()

    def _rounds(self) -> None:
        study = self._folder.study()
        self._sites, self._roster_read = frozenset(study.sites), None
        strategy = FederatedAveraging(study, self._start.weights, self._roster)
        strategy.optimizer, strategy.heads = self._start.optimizer, dict(self._start.heads)
        rounds = study.training.rounds

        def keep() -> None:
            checkpoint = Checkpoint(self._done, strategy.weights, strategy.optimizer, strategy.heads)
            save(self._folder.checkpoint, checkpoint, self._folder.terms.study)

        def on_round(record: RoundRecord) -> None:
            progress.append(self._folder.metrics, record, counted=True)
            self._done, self._retry = record.round_number, RETRY
            keep()
            self._report(record, f"round {record.round_number}/{rounds}")
            if self._done < rounds:
                self._now.show("round", self._done + 1)

        def on_no_quorum(record: RoundRecord, error: QuorumError) -> None:
            progress.append(self._folder.metrics, record, counted=False)
            keep()  # the heads of ledgers, of which the replies may have brought newer ones
            log.warning("paused: %s", error)
            self._tell(f"paused: {error}")
            self._now.show("waiting", record.round_number, str(error))
            self._pause(study.quorum)
            self._now.show("round", record.round_number)

        if self._done < rounds:
            self._await_quorum(study.quorum)
            self._now.show("round", self._done + 1)
        run(
            self._grid,
            strategy,
            rounds=rounds,
            first_round=self._done + 1,
            deadline=self._folder.terms.deadline_seconds,
            on_round=on_round,
            on_no_quorum=on_no_quorum,
        )
        write_atomically(self._folder.path / "weights.safetensors", to_bytes(strategy.weights))
        if study.metrics is not None:
            self._now.show("metrics", self._done)
            replies = ask_for_metrics(self._grid, strategy, deadline=self._folder.terms.deadline_seconds)
            keep()  # the heads of ledgers, which have moved on
            found = evaluation.evaluation(study, replies)
            evaluation.write(self._folder.path, found)
            for line in evaluation.lines(found):
                log.info("%s", line.strip())
                self._tell(line)
        self._tell(f"finished: {rounds} rounds; weights in {self._folder.path / 'weights.safetensors'}")

    def _report(self, record: RoundRecord, what: str) -> None:
        log.info("%s: %s, %.2f s", what, ", ".join(record.sites), record.seconds)
        self._tell(f"{what}  {len(record.sites)} sites  {record.seconds:.2f} s")
        for site, reason in sorted(record.refused.items()):
            log.warning("%s: %s sent no update (%s)", what, site, reason)
            self._tell(f"{what}  {site} sent no update ({reason})")

    def _await_quorum(self, quorum: int) -> None:
        """Wait until as many sites are connected; asking fewer could not succeed."""
        told = -1
        while (online := sum(one.online for one in self._link.presence().values())) < quorum:
            if online != told:
                told, note = online, f"{online} sites connected, the study's quorum is {quorum}"
                self._now.show("waiting", self._done + 1, note)
                self._tell(f"waiting: {note}")
            self._look()

    def _pause(self, quorum: int) -> None:
        """After a round without quorum: until enough sites are connected, and one of them anew or time has passed."""
        before = {one.site: one.activated for one in self._link.presence().values()}
        end = time.monotonic() + self._retry
        self._retry = min(2 * self._retry, LONGEST_RETRY)
        while time.monotonic() < end:
            if {
                one.site: one.activated for one in self._link.presence().values() if one.online
            }.items() - before.items():
                break
            self._look()
        self._await_quorum(quorum)

    def _look(self) -> None:
        self._saw(self._link.presence())
        self._grid.wait(LOOK)

    def _saw(self, presence: Mapping[int, Presence]) -> None:
        """Called at least once a second while the server waits."""
        self._now.beat({one.site: one for one in presence.values()})
        self._read_roster()

    def _roster(self) -> dict[int, str]:
        self._read_roster()
        return {node: one.site for node, one in self._link.presence().items()}

    def _read_roster(self) -> None:
        """Let in who is on the roster now; a roster that cannot be read leaves the one before."""
        first = self._roster_read is None
        try:
            status = (self._folder.path / "roster.yaml").stat()
            changed = (status.st_mtime_ns, status.st_size)
            if changed == self._roster_read:
                return
            self._roster_read = changed
            roster = self._folder.roster()
        except OSError as error:  # an editor that saves takes the file away for a moment; looked at again in a second
            if first:
                raise ConfigurationError(f"roster.yaml: cannot be read ({error.strerror}); put it back") from None
            return
        except ConfigurationError as error:
            if first:
                raise
            log.error("the roster stays as it was: %s", error)
            return
        self._link.admit({s: key for s, key in roster.items() if self._sites is None or s in self._sites})
        log.info("roster: %s", ", ".join(roster) or "nobody")


def _health(study: str) -> Callable[[], Mapping[str, object]]:
    version, code = importlib.metadata.version("wardround"), code_digest()
    return lambda: {"wardround": version, "wire": WIRE_VERSION, "study": study, "code": code, "time": time.time()}


def _checked_tls(folder: ServerFolder, tell: Tell) -> Tls:
    left = days_left(read_certificate(folder.certificate))
    if left <= 0:
        raise ConfigurationError(
            f"{folder.certificate}: expired {-left:.0f} days ago; run `wardround server init {folder.path} "
            "--renew-certificate` (hospitals need nothing new)"
        )
    if left < RENEW_DAYS:
        tell(f"the server's certificate expires in {left:.0f} days; renew it with `--renew-certificate` and restart")
    return Tls(folder.certificate, folder.key)


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within it, SIGTERM and SIGINT call `stop`. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda _number, _frame: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
