"""The dry run: exactly what would leave, on disk; nothing sent, nothing charged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from typer.testing import CliRunner

from client.commands import app
from client.dry_run import dry_run
from client.site_file import load_site_file
from client.state import LEDGER, StateFolder
from common.batching import Dataset
from common.errors import ConfigurationError
from common.models.network import build_network
from common.records import Status, reply_from_message
from common.study import load_study
from common.training import state_of
from tests.client.hospitals import with_key, write_site, write_study


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command sets for its process is put back."""
    monkeypatch.setenv("FLWR_HOME", "")
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@pytest.fixture
def site_file(cohort: dict[str, Path], tmp_path: Path) -> Path:
    write_study(tmp_path)
    path = write_site(tmp_path, cohort["north"], {"address": "localhost:1", "plaintext": True})
    with_key(path)
    return path


def test_it_writes_what_would_be_sent_and_nothing_else(site_file: Path, tmp_path: Path) -> None:
    """The files are the bodies of the requests: put together by Flower, they are the reply that the JSON lists."""
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["run", str(site_file), "--dry-run", str(out)])
    assert result.exit_code == 0, result.output
    listed = json.loads((out / "reply.json").read_text())
    first, *others = listed["requests"]
    announced = PushMessagesRequest.FromString((out / first["file"]).read_bytes())
    pushed = [PushObjectRequest.FromString((out / one["file"]).read_bytes()) for one in others]
    reply = message_from_proto(announced.messages_list[0])
    inflated = inflate_object_from_contents(
        reply.metadata.message_id, {push.object_id: push.object_content for push in pushed}
    )
    assert isinstance(inflated, Message)
    reply.content = inflated.content
    sent = reply_from_message(reply)
    assert sent.status is Status.OK
    assert sent.update is not None
    fields = listed["reply"]
    assert (fields["study"], fields["round"], fields["status"]) == (sent.header.study, 1, "OK")
    assert fields["update"] == {
        name: {"dtype": "float32", "shape": list(array.shape), "bytes": array.nbytes}
        for name, array in sent.update.items()
    }
    expected = state_of(build_network(load_study(tmp_path / "study.yaml")))
    assert {name: array.shape for name, array in sent.update.items()} == {n: a.shape for n, a in expected.items()}
    assert {path.name for path in out.iterdir()} == {"reply.json", *(one["file"] for one in listed["requests"])}
    assert all(one["bytes"] == (out / one["file"]).stat().st_size for one in listed["requests"])
    assert f"{sum(one['bytes'] for one in listed['requests']):,} bytes" in result.output
    assert "No patient was drawn" in result.output


def test_it_is_private_charges_nothing_and_repeats_no_noise(site_file: Path, tmp_path: Path) -> None:
    """Files for this user alone, no ledger, and other noise each time, so that nothing later has it in common."""
    site = load_site_file(site_file)
    state = with_state(site.state)
    first, second = (dry_run(site, state, tmp_path / name).reply.update for name in ("one", "two"))
    assert first is not None
    assert second is not None
    assert all((first[name] != second[name]).any() for name in first)
    assert (tmp_path / "one").stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "one").iterdir())
    assert not (state / LEDGER).exists()


def test_no_patient_is_in_it(site_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's sample is empty, so the update is noise alone and the folder is harmless."""
    drawn: list[int] = []
    usual = Dataset.micro_batches

    def micro_batches(self: Dataset, patients: Any, max_rows: int) -> Any:
        drawn.append(len(patients))
        return usual(self, patients, max_rows)

    monkeypatch.setattr(Dataset, "micro_batches", micro_batches)
    site = load_site_file(site_file)
    assert dry_run(site, with_state(site.state), tmp_path / "out").reply.update is not None
    assert drawn == [0]


def test_it_does_not_overwrite(site_file: Path, tmp_path: Path) -> None:
    """A folder that holds something is refused before anything is trained."""
    site = load_site_file(site_file)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(ConfigurationError, match="exists and is not empty; name a new folder"):
        dry_run(site, with_state(site.state), tmp_path / "out")


def test_the_policy_counts(site_file: Path, tmp_path: Path) -> None:
    """A study beyond the site's limits gets the answer that a server would get: a code without an update."""
    text = site_file.read_text().replace("max_epsilon: 3.0", "max_epsilon: 1.0")
    site_file.write_text(text)
    site = load_site_file(site_file)
    reply = dry_run(site, with_state(site.state), tmp_path / "out").reply
    assert (reply.status, reply.update) == (Status.POLICY, None)


def with_state(path: str) -> StateFolder:
    return StateFolder(Path(path))
