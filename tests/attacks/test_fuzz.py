"""A handful of spoilt bytes for every decoder; `python -m tests.attacks.fuzz` does the same for as long as wanted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.attacks.decoders import Decoder, all_decoders
from tests.attacks.fuzz import HangError, Tally, attempt, batch, within

EXAMPLES = 4


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Decoder]]:
    with all_decoders(tmp_path_factory.mktemp("fuzz")) as found:
        yield found


def test_every_decoder_reads_what_it_is_made_for_and_survives_what_it_is_not(decoders: list[Decoder]) -> None:
    """A value or a documented error, for each of them; none is left out by name."""
    assert len({decoder.name for decoder in decoders}) == len(decoders) > 40
    for decoder in decoders:
        tally = Tally()
        attempt(decoder, decoder.valid[0], tally)
        assert decoder.name.startswith("answer") or tally.refused == 0, decoder.name
        batch(decoder, EXAMPLES, tally)


def wrong(content: bytes) -> None:
    """A decoder with a defect."""
    if content[:1] == b"\x00":
        raise IndexError


def test_the_search_finds_a_defect() -> None:
    """An error that is not documented, and an endless loop, are found."""
    with pytest.raises(IndexError):
        batch(Decoder("wrong", (b"\x00x",), wrong, (ValueError,)), 50, Tally())
    with pytest.raises(HangError), within(0.05):
        threading.Event().wait()


def test_an_error_that_steers_a_terminal_is_found() -> None:
    """What an error says is looked at, too."""

    def said(content: bytes) -> None:
        raise ValueError("\x1b[2J")

    with pytest.raises(AssertionError, match="steers a terminal"):
        attempt(Decoder("said", (b"",), said, (ValueError,)), b"", Tally())
