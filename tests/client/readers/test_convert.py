"""Writing the MEDS folder: whole or not at all, the same however the rows are divided."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from client.commands import app
from client.readers import convert as converting
from client.readers import event_tables, tables
from client.readers.convert import BUCKETS, bucket_of
from common.errors import ConfigurationError, DataError
from tests.client.readers.extracts import convert_to, events_of

ROOT = Path(__file__).resolve().parents[3]
TABLE = {"files": "e.csv", "patient": "p", "time": "t", "code": "c", "value": "v"}
SITE = """\
version: 1
site: north
study: study.yaml
records: meds
{extra}policy: {{max_epsilon: 3.0, delta: 1.0e-5}}
server: {{address: "127.0.0.1:8643", plaintext: true}}
state: state
"""
FORMAT = "format: {kind: events, tables: [{files: e.csv, patient: p, time: t, code: c, value: v}]}\n"


def rows_of(patients: int, each: int) -> str:
    """A table whose rows of one patient are far apart."""
    lines = [f"{p - 3},2024-01-{1 + k % 28:02} 08:00,C{k},{k}" for k in range(each) for p in range(patients)]
    return "\n".join(["p,t,c,v", *lines]) + "\n"


def test_a_division_into_shards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches and shards give the same events in the same order as one batch, each patient in one shard."""
    (tmp_path / "e.csv").write_text(rows_of(300, 12))
    assert convert_to(tmp_path / "one", kind="events", tables=[TABLE]).shards == 1
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(converting, "BATCH_EVENTS", 500)
    monkeypatch.setattr(converting, "SHARD_EVENTS", 700)
    done = convert_to(tmp_path / "many", kind="events", tables=[TABLE])
    assert (done.events, done.patients, done.codes) == (3600, 300, 12)
    assert done.shards >= 6
    assert events_of(tmp_path / "many").equals(events_of(tmp_path / "one"))
    sizes = [len(pl.read_parquet(path)) for path in (tmp_path / "many/data").iterdir()]
    assert max(sizes) <= 700


def test_buckets_are_even_and_cover_negative_numbers() -> None:
    """Neighbouring and negative patient numbers spread evenly: no bucket has twice its share."""
    subjects = pl.Series(np.arange(-(2**63), -(2**63) + 51_200, dtype=np.int64))
    for numbers in (subjects, pl.Series(np.arange(-25_600, 25_600) * 1000)):
        counts = np.bincount(bucket_of(numbers).astype(np.int64), minlength=BUCKETS)
        assert len(counts) == BUCKETS
        assert counts.max() < 2 * 200


def test_a_fact_that_repeats_counts_once_and_other_events_stay(tmp_path: Path) -> None:
    """Facts without a time are a set; two equal events of one moment are two."""
    (tmp_path / "e.csv").write_text("p,t,c,v\n1,2024-01-01,A,1\n1,2024-01-01,A,1\n")
    facts = {"files": "e.csv", "patient": "p", "code": "c"}
    convert_to(tmp_path / "out", kind="events", tables=[TABLE, facts])
    assert events_of(tmp_path / "out")["time"].is_null().to_list() == [True, False, False]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder with anything in it is refused and left alone; an empty one is filled."""
    (tmp_path / "e.csv").write_text(rows_of(1, 1))
    (tmp_path / "out").mkdir()
    convert_to(tmp_path / "out", kind="events", tables=[TABLE])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(ConfigurationError, match="is not empty and nothing is overwritten"):
        convert_to(tmp_path / "out", kind="events", tables=[TABLE])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(ConfigurationError, match="is no folder"):
        convert_to(tmp_path / "e.csv", kind="events", tables=[TABLE])


@pytest.mark.parametrize("error", [DataError("x"), KeyboardInterrupt(), MemoryError()])
def test_a_conversion_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Whatever stops it half-way, neither OUT nor a part of it is there."""
    (tmp_path / "e.csv").write_text(rows_of(300, 12))
    monkeypatch.setattr(tables, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(converting, "BATCH_EVENTS", 500)
    original, blocks = event_tables.EventTablesReader._events, []

    def third_fails(self: event_tables.EventTablesReader, block: pl.DataFrame, *rest: object) -> pl.DataFrame:
        blocks.append(block)
        if len(blocks) == 12:
            raise error
        return original(self, block, *rest)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(event_tables.EventTablesReader, "_events", third_fails)
    with pytest.raises(type(error)):
        convert_to(tmp_path / "out", kind="events", tables=[TABLE])
    assert [path.name for path in tmp_path.iterdir()] == ["e.csv"]


KILLED = """
import os, signal, sys
from pathlib import Path
from client.readers import convert as converting
converting._write_labels = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from tests.client.readers.extracts import convert_to
convert_to(Path(sys.argv[1]), kind="events", tables=[dict(files="e.csv", patient="p", code="c")])
"""


def test_a_kill_leaves_no_folder_that_looks_whole(tmp_path: Path) -> None:
    """After kill -9 OUT is absent; what is left is hidden and named `.partial`; a second try succeeds."""
    (tmp_path / "e.csv").write_text(rows_of(3, 3))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name != "e.csv"]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert left[0].endswith(".partial")
    assert convert_to(tmp_path / "out", kind="events", tables=[TABLE]).events == 9


def test_the_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    """Nobody else on the machine may open it."""
    (tmp_path / "e.csv").write_text(rows_of(1, 1))
    convert_to(tmp_path / "out", kind="events", tables=[TABLE])
    assert os.stat(tmp_path / "out").st_mode & 0o077 == 0


@pytest.mark.parametrize("text", [SITE.format(extra=FORMAT), "version: 1\n" + FORMAT])
def test_the_command_takes_a_site_file_or_the_format_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """`wardround client convert` reads either, with paths from the file's folder, and prints counts alone."""
    monkeypatch.setattr(os, "umask", lambda mode: mode)
    (tmp_path / "e.csv").write_text(rows_of(5, 2))
    (tmp_path / "file.yaml").write_text(text)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "file.yaml"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "10 events, 5 patients, 2 codes" in done.output
    assert len(events_of(tmp_path / "out")) == 10


def test_a_site_file_without_format_says_so(tmp_path: Path) -> None:
    """It is one clear line."""
    (tmp_path / "file.yaml").write_text(SITE.format(extra=""))
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "file.yaml"), str(tmp_path / "out")])
    assert isinstance(done.exception, ConfigurationError)
    assert "has no `format:`" in str(done.exception)
