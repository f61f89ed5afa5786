"""Two processes with one key: when it is one, and what follows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError
from server.instances import Instances

START = datetime(2027, 1, 1, tzinfo=UTC)


def at(second: float) -> datetime:
    return START + timedelta(seconds=second)


@pytest.fixture
def instances(tmp_path: Path) -> Instances:
    """North's first process has said hello at second 10."""
    found = Instances(tmp_path / "contested.json")
    assert found.hear(b"k", "north", "one", at(10), greets=True)
    return found


def test_a_process_that_was_followed_by_another_and_speaks_again_is_one_too_many(instances: Instances) -> None:
    """The first process's next word after the second one's hello is the alarm, and then nobody is heard any more."""
    assert instances.hear(b"k", "north", "two", at(20), greets=True)
    assert instances.hear(b"k", "north", "two", at(21), greets=False)
    assert not instances.contested(b"k")
    assert not instances.hear(b"k", "north", "one", at(22), greets=False)
    assert instances.contested(b"k")
    for process in ("one", "two", "three"):
        for greets in (True, False):
            assert not instances.hear(b"k", "north", process, at(23), greets=greets)


def test_another_sites_key_is_not_concerned(instances: Instances) -> None:
    """A contested key is that key alone: the new one of the same site is heard."""
    instances.hear(b"k", "north", "two", at(20), greets=True)
    instances.hear(b"k", "north", "one", at(22), greets=False)
    assert instances.hear(b"new", "north", "one", at(22), greets=False)
    assert not instances.contested(b"new")


def test_what_a_dead_process_sent_before_is_no_second_process(instances: Instances) -> None:
    """A word that was signed before the successor's hello, however late it arrives, is taken as it is."""
    assert instances.hear(b"k", "north", "two", at(20), greets=True)
    for second in (19, 20):
        assert instances.hear(b"k", "north", "one", at(second), greets=False)
    assert not instances.contested(b"k")


def test_a_server_that_starts_anew_takes_the_first_it_hears(tmp_path: Path) -> None:
    """Without a hello the first process heard is the site, and a second one beside it is the alarm."""
    found = Instances(tmp_path / "contested.json")
    assert found.hear(b"k", "north", "one", at(1), greets=False)
    assert not found.hear(b"k", "north", "two", at(2), greets=False)


def test_the_alarm_outlives_the_server(instances: Instances, tmp_path: Path) -> None:
    """The next server shuts the same key out from its first word on."""
    instances.hear(b"k", "north", "two", at(20), greets=True)
    instances.hear(b"k", "north", "one", at(22), greets=False)
    assert not Instances(tmp_path / "contested.json").hear(b"k", "north", "one", at(99), greets=True)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"[" * 100_000])
def test_a_damaged_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    """Who is contested is not guessed."""
    (tmp_path / "contested.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"contested\.json"):
        Instances(tmp_path / "contested.json")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["hello", "word", "goodbye", "killed"]), st.integers(0, 9)), max_size=40))
def test_one_process_after_the_other_is_never_an_alarm(story: list[tuple[str, int]]) -> None:
    """Whatever one client says, dies of and starts again with: no alarm, also with its last words still under way."""
    found = Instances(Path("/nonexistent/contested.json"))
    process, second, late = 0, 0, None
    assert found.hear(b"k", "north", "0", at(0), greets=True)
    for what, pause in story:
        second += pause
        if what == "killed":
            late = str(process), at(second)
            process += 1
        if what in ("killed", "hello", "goodbye"):
            assert found.hear(b"k", "north", str(process), at(second), greets=True)
        else:
            assert found.hear(b"k", "north", str(process), at(second), greets=False)
        if late is not None:
            assert found.hear(b"k", "north", *late, greets=False)
    assert not found.contested(b"k")
