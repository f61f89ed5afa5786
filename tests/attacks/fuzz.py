"""Bytes that were made for a decoder and then spoilt, by the thousand: no crash, no hang, no memory without bound.

    python -m tests.attacks.fuzz --minutes 10

Every decoder of tests/attacks/decoders.py gets the same share of the time, in a process whose memory is bounded. An
example may end in a value or in a documented error, whose text a terminal can print. Whatever else happens is printed
with the shortest bytes that Hypothesis finds for it, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.attacks.decoders import Decoder, all_decoders

BATCH = 25  # examples at a time
LONGEST = 10.0  # seconds that one example may take; the machine may be busy
GROWTH = 256 * 1024  # kB that all examples together may add to the process
LIMIT = 2 * 2**30  # bytes of address space beyond what the process has at the start: an allocation beyond it fails
SILENCE = 600.0  # seconds without a word after which the process is taken for stuck where no signal reaches it
LARGEST = 2**20  # bytes of an example
WORDS = (
    *(b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 30, b"9" * 5000, b"0x" + b"f" * 20, b"1_0"),
    *(b"null", b"true", b"yes", b"[]", b"{}", b'""', b"[" * 3000, b"{" * 500, b'{"a":' * 3000, b"- " * 500),
    *(b"&a [*a, *a]", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"!!binary aGk=", b"2020-13-45"),
    *(b"../../../etc/passwd", b"/dev/zero", b"\x00", b"\x1b[2J", b"\r\n", b"\xff\xfe", b"\xed\xa0\x80", "é‮".encode()),
    *(b"\xff" * 9 + b"\x01", b"\x80" * 11, b"\x08", b"\x12\xff\xff\xff\xff\x0f", b"\x7f\xff\xff\xff\xff\xff\xff\xff"),
)
_TOKEN = re.compile(rb"[\w.+-]+")


class HangError(BaseException):
    """An example took too long; no Exception, so that no decoder takes it for its own."""


@st.composite
def spoilt(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of `valid` with up to six changes, or bytes of chance."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("byte", "cut", "end", "repeat", "word", "exchange", "chance")))
        if kind == "byte":
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + draw(st.integers(1, 64)) :]
        elif kind == "end":
            data = data[:at]
        elif kind == "repeat":
            data = (
                data[:at] + data[at : at + draw(st.integers(1, 64))] * draw(st.sampled_from((2, 50, 2000))) + data[at:]
            )
        elif kind == "word":
            data = data[:at] + draw(st.sampled_from(WORDS)) + data[at:]
        elif kind == "exchange":
            token = _TOKEN.search(data, at)
            if token is not None:
                data = data[: token.start()] + draw(st.sampled_from(WORDS)) + data[token.end() :]
        else:
            data = data[:at] + draw(st.binary(max_size=16)) + data[at:]
    return data[:LARGEST]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise HangError if the block takes longer. In the main thread."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Tally:
    """Examples of one decoder so far: how many, and how many of them were refused."""

    examples: int = 0
    refused: int = 0


def attempt(decoder: Decoder, content: bytes, tally: Tally) -> None:
    """One example. Raises AssertionError, or whatever the decoder raises against its word."""
    tally.examples += 1
    try:
        with within(LONGEST):
            decoder.read(content)
    except decoder.refuses as error:
        tally.refused += 1
        said = str(error)
        assert said.replace("\n", "").isprintable(), f"an error that steers a terminal: {said!r}"
        assert len(said) < 100_000, f"an error of {len(said)} characters"
    except HangError:
        raise AssertionError(f"longer than {LONGEST:.0f} s") from None


def batch(decoder: Decoder, examples: int, tally: Tally) -> None:
    """So many examples; raises what the shortest one that fails does."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(content=spoilt(decoder.valid))
    def run(content: bytes) -> None:
        attempt(decoder, content, tally)

    run()


def largest_kb() -> int:
    """The most memory that this process has had at once."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(seconds: float, only: str = "") -> int:
    """The bounded process: all decoders in turn until the time is over; says what it does as it goes."""
    import resource

    faults = 0
    with tempfile.TemporaryDirectory() as folder, all_decoders(Path(folder)) as found:
        decoders = [decoder for decoder in found if only in decoder.name]
        tallies = {decoder.name: Tally() for decoder in decoders}
        for decoder in decoders:
            print(f"... {decoder.name}", flush=True)
            for valid in decoder.valid:  # no limit yet: what is loaded late is loaded now
                with contextlib.suppress(*decoder.refuses):
                    decoder.read(valid)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT, size + LIMIT))
        before, end, share = largest_kb(), time.monotonic() + seconds, seconds / len(decoders) / 3
        broken: set[str] = set()
        while len(broken) < len(decoders):
            for decoder in decoders:
                print(f"... {decoder.name}", flush=True)
                turn, tally = min(time.monotonic() + share, end), tallies[decoder.name]
                # At least one batch each, on a machine however busy.
                while decoder.name not in broken and (time.monotonic() < turn or not tally.examples):
                    try:
                        batch(decoder, BATCH, tally)
                    except Exception as error:
                        faults += 1
                        broken.add(decoder.name)
                        notes = "\n".join(getattr(error, "__notes__", []))
                        print(f"FAULT {decoder.name}: {type(error).__name__}: {error}\n{notes}", flush=True)
            if time.monotonic() >= end:
                break
        grown = largest_kb() - before
        for name, tally in tallies.items():
            print(f"{tally.examples:>9,} examples, {tally.refused:>9,} refused  {name}")
        total = sum(tally.examples for tally in tallies.values())
        print(f"{total:,} examples of {len(decoders)} decoders; memory grew by {grown:,} kB of {GROWTH:,} allowed")
        if grown > GROWTH:
            print("FAULT memory")
            faults += 1
    return 1 if faults else 0


def main() -> int:
    """Start the bounded process and listen to it, because a signal does not end a library's endless loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default="", help="decoders whose names hold this")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(60 * arguments.minutes, arguments.only)
    import selectors

    command = [
        sys.executable,
        "-m",
        "tests.attacks.fuzz",
        "--work",
        "--minutes",
        str(arguments.minutes),
        "--only",
        arguments.only,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, selectors.DefaultSelector() as ready:
        assert process.stdout is not None
        ready.register(process.stdout, selectors.EVENT_READ)
        last = ""
        while True:
            if not ready.select(SILENCE):
                process.kill()
                print(f"FAULT: stuck, or killed for its memory, in {last}")
                return 1
            line = process.stdout.readline()
            if not line:
                break
            last = line.removeprefix("... ").strip() if line.startswith("... ") else last
            if not line.startswith("... "):
                print(line, end="", flush=True)
        status = process.wait()
    if status not in (0, 1):
        print(f"FAULT: ended with {status} in {last}")
    return status


if __name__ == "__main__":
    sys.exit(main())
