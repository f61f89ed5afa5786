"""docs/from-extract-to-study.md, typed line by line: from two CSV files to four hospitals that train together."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from client.readers.formats import EventTables
from client.site_file import load_site_file
from tests.e2e.deployment import ROOT, Deployment, Running, deployed, free_port, write_study

DATA = Path(os.environ.get("WARDROUND_DATA", ROOT.parent / "shared" / "data")) / "diabetes130"
PAGE = ROOT / "docs" / "from-extract-to-study.md"
SITE_FILES = ROOT / "configs" / "sites" / "diabetes130"
STUDY = ROOT / "configs" / "diabetes130.yaml"
SITES = ("hmo", "medicare", "other_payer", "payer_missing")
ROUNDS = 3


def lines_of_page() -> list[str]:
    """The commands of the page, in its order."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("site", SITES)
def test_a_site_file_has_less_than_twenty_lines(site: str) -> None:
    """It loads, is short, and is that of its neighbour but for the name."""
    text = (SITE_FILES / f"{site}.yaml").read_text()
    assert len(text.splitlines()) < 20
    assert text.replace(site, "hmo") == (SITE_FILES / "hmo.yaml").read_text()
    assert isinstance(load_site_file(SITE_FILES / f"{site}.yaml").format, EventTables)


def test_the_page_shows_every_step() -> None:
    """From the extract to the budget, no step of a study is missing on the page."""
    steps = [" ".join(line.split()[1:3]) for line in lines_of_page() if line.startswith("wardround")]
    assert steps == [
        *("server init", "client convert", "client check", "client keygen", "server admit"),
        *("server run", "client enrol", "client run", "server status", "client budget"),
    ]


@dataclass
class Followed:
    """What was typed and what came of it: the processes by command, and the folder."""

    folder: Path
    said: dict[str, list[Running]] = field(default_factory=dict)

    def texts(self, command: str) -> list[str]:
        """What a command said, once for each hospital or once in all."""
        return [running.text for running in self.said[command]]


def typed(deployment: Deployment, line: str, study: Path, port: int) -> Iterator[tuple[str, list[str]]]:
    """(command, arguments) of a line of the page, for each hospital if it names one."""
    for site in SITES if "hmo" in line else ("",):
        words = shlex.split(os.path.expandvars(line.replace("hmo", site or "hmo")))[1:]
        command = " ".join(words[:2])
        if command == "server init":  # fewer rounds, and a port that is free here
            words = [*words, "--port", str(port)]
            words[words.index("--study") + 1] = str(study)
        yield command, [*words, "--yes"] if command == "client enrol" else words


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    root, port = tmp_path_factory.mktemp("from-extract"), free_port()
    declared = {site: terms["declared_patients"] for site, terms in yaml.safe_load(STUDY.read_text())["sites"].items()}
    study = write_study(root / "terms" / "study.yaml", declared, STUDY, training={"rounds": ROUNDS})
    with pytest.MonkeyPatch.context() as patch, deployed(root / "d") as deployment:
        patch.setenv("CHECKOUT", str(ROOT))
        patch.setenv("DATA", str(DATA / "csv"))
        found = Followed(root / "d" / "cwd")
        for line in lines_of_page():
            if not line.startswith("wardround"):
                subprocess.run(["bash", "-euc", line], cwd=found.folder, check=True)
                continue
            for command, words in typed(deployment, line, study, port):
                running = deployment.start(command.replace(" ", "-"), *words)
                found.said.setdefault(command, []).append(running)
                if command == "server run":
                    running.wait_for("listening on")
                elif command != "client run":
                    running.finish()
            if line.startswith("wardround server init"):
                _set_port(found.folder, port)
            elif line.startswith("wardround client run"):
                found.said["server run"][0].finish(seconds=900)
                assert [running.end() for running in found.said["client run"]] == [0] * len(SITES)
        yield found


def _set_port(folder: Path, port: int) -> None:
    for path in (folder / "sites").iterdir():
        path.write_text(path.read_text().replace("8643", str(port)))
    server = folder / "study" / "server.yaml"
    server.write_text(yaml.safe_dump(yaml.safe_load(server.read_text()) | {"host": "127.0.0.1"}))


full = [
    pytest.mark.full,  # two dozen processes over 1.9 million events
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not (DATA / "csv").is_dir(), reason=f"{DATA / 'csv'} is absent"),
]


class TestFollowed:
    """After the last line of the page."""

    pytestmark = full

    def test_every_event_and_label_is_converted(self, followed: Followed) -> None:
        """All 1,943,790 events, and the labels of the MEDS folders that were made elsewhere, are at some hospital."""
        events = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in followed.texts("client convert")]
        assert sum(events) == 1_943_790
        for site in SITES:
            stay = (pl.col("prediction_time") - datetime(2000, 1, 1)).dt.total_days() // 30
            ours, theirs = (
                pl.read_parquet(folder / site / "labels" / "readmit_30d_each_visit.parquet").select(
                    "subject_id", stay, "boolean_value"
                )
                for folder in (followed.folder / "meds", DATA / "meds")
            )
            assert ours.sort(ours.columns).equals(theirs.sort(theirs.columns))

    def test_every_requirement_holds_at_every_hospital(self, followed: Followed) -> None:
        """`client check` passes, all 15 requirements."""
        for text in followed.texts("client check"):
            assert [line.split()[0] for line in text.splitlines()[:-1]] == ["pass"] * 15

    def test_every_round_has_all_four_hospitals(self, followed: Followed) -> None:
        """The study finishes, each round with an update of every hospital."""
        (said,) = followed.texts("server run")
        assert f"finished: {ROUNDS} rounds" in said
        lines = (followed.folder / "study" / "state" / "metrics.jsonl").read_text().splitlines()
        rounds: list[dict[str, Any]] = [yaml.safe_load(line) for line in lines]
        assert [(r["round"], r["sites"], r["refused"]) for r in rounds] == [
            (number, list(SITES), {}) for number in range(1, ROUNDS + 1)
        ]

    def test_every_budget_shows_what_was_spent(self, followed: Followed) -> None:
        """Each hospital's own ledger names the study, whose price is epsilon 3 of its 3."""
        for text in followed.texts("client budget"):
            assert "diabetes130" in text
            assert re.search(r"epsilon (2\.9\d\d|3\.000) charged .* left of 3 at delta 1e-05", text)
