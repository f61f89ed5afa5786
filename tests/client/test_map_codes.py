"""A site's code map: proposed, confirmed, and applied wherever a study reads the records; it stays at the site."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from client.commands import app
from client.mapping import CodeMap
from client.mapping_proposals import About
from client.mapping_survey import survey_codes, write_map
from client.prediction.asked import ask
from client.readers.meds import MedsDirectory
from client.readers.own import open_records, read_records
from client.site_file import load_site_file
from common.errors import ConfigurationError, DataError
from common.terms import load
from tests.client.hospitals import with_key, write_site, write_study

SERVER = {"address": "localhost:1", "plaintext": True}
LOCAL = {"CODE//": "OURS//", "VITAL//": "Vital//"}  # as this hospital writes them
DESCRIBED = ("OURS//7", "Our seventh")


@pytest.fixture
def records(own_process: None, cohort: dict[str, Path], tmp_path: Path) -> Path:
    """North's records with its own codes, of which codes.parquet knows the parents; no label and no split changes."""
    shutil.copytree(cohort["north"], tmp_path / "records")
    path = tmp_path / "records" / "data" / "0.parquet"
    events = pl.read_parquet(path)
    code = pl.col("code")
    for theirs, ours in LOCAL.items():
        code = code.str.replace(f"^{theirs}", ours)
    events.with_columns(code).write_parquet(path)
    ours = events.select(code.unique())["code"].to_list()
    pl.DataFrame(
        {
            "code": ours,
            "description": [DESCRIBED[1] if one == DESCRIBED[0] else None for one in ours],
            "parent_codes": [[one.replace("OURS//", "CODE//")] if one.startswith("OURS") else None for one in ours],
        },
        schema_overrides={"description": pl.String, "parent_codes": pl.List(pl.String)},
    ).write_parquet(tmp_path / "records" / "metadata" / "codes.parquet")
    write_study(tmp_path)
    return tmp_path / "records"


def map_codes(records: Path, *arguments: object, **changes: Any) -> str:
    """Output of the command; errors of ours are raised."""
    path = write_site(records.parent, records, SERVER, **changes)
    done = CliRunner().invoke(app, ["map-codes", str(path), str(records.parent / "study.yaml"), *map(str, arguments)])
    if done.exception is not None:
        raise done.exception
    return done.output


def confirm(path: Path) -> None:
    path.write_text(path.read_text().replace("confirmed: false", "confirmed: true"))


def same(records: Path, cohort: dict[str, Path], **changes: Any) -> bool:
    """Whether a study reads these records as it reads the cohort's own."""
    site, state, _ = with_key(write_site(records.parent, records, SERVER, **changes))
    study = write_study(records.parent)
    ours = read_records(site, study, state)
    theirs = MedsDirectory(cohort["north"]).read(
        study.task.name, study.features, site.splits, max_steps=study.records.max_steps, bin_hours=None
    )
    return all(np.array_equal(getattr(ours, f.name), getattr(theirs, f.name)) for f in dataclasses.fields(ours))


def test_from_proposal_to_the_same_sequences(records: Path, cohort: dict[str, Path]) -> None:
    """Nothing is known; all is proposed; nothing applies until confirmed; then it reads as if the codes were theirs."""
    out = records.parent / "map.yaml"
    said = map_codes(records, "--out", out)
    assert "100.0% if every entry were confirmed" in said
    assert out.stat().st_mode & 0o077 == 0
    found = load(out, CodeMap)
    assert {(entry.how, entry.confirmed) for entry in found.codes} == {("parent", False), ("exact", False)}
    assert {entry.site: entry.means for entry in found.codes if entry.means} == dict([DESCRIBED])
    site = load_site_file(write_site(records.parent, records, SERVER, code_map="map.yaml"))
    schema = write_study(records.parent).features
    assert open_records(site, schema).coverage(schema) == MedsDirectory(records).coverage(schema)
    confirm(out)
    assert same(records, cohort, code_map="map.yaml")


def test_predict_sees_what_run_sees(records: Path) -> None:
    """The sequences that are predicted are those that training reads, mapped codes included."""
    out = records.parent / "map.yaml"
    map_codes(records, "--out", out)
    confirm(out)
    site, state, _ = with_key(write_site(records.parent, records, SERVER, code_map="map.yaml"))
    study = write_study(records.parent)
    trained, asked = read_records(site, study, state), ask(site, study, state, splits=site.splits).sequences
    assert len(trained.label) == len(asked.label)
    for column in dataclasses.fields(trained):
        assert np.array_equal(getattr(trained, column.name), getattr(asked, column.name)), column.name


def test_check_sees_what_run_sees(records: Path) -> None:
    """The mapped share and the confirmed entries are in the local answer; no page that is shared has a site's code."""
    out = records.parent / "map.yaml"
    map_codes(records, "--out", out)
    confirm(out)
    entries = len(load(out, CodeMap).codes)
    done = CliRunner().invoke(app, ["check", str(records.parent / "site.yaml"), "--out", str(records.parent / "plain")])
    assert "fail        codes" in done.output
    path = write_site(records.parent, records, SERVER, code_map="map.yaml")
    done = CliRunner().invoke(app, ["check", str(path), "--out", str(records.parent / "mapped")])
    assert "pass        codes           100.0% of events" in done.output
    assert f"{entries} of {entries} entries of the code map are confirmed" in done.output
    for page in ("plain", "mapped"):
        shared = (records.parent / page / "share.html").read_text()
        assert "OURS" not in shared
        assert "Our seventh" not in shared
        assert "map.yaml" not in shared


def test_a_reply_holds_nothing_of_the_map(records: Path) -> None:
    """What a round would send, and the site's log, hold neither a code of the site nor a word of the map."""
    out = records.parent / "map.yaml"
    map_codes(records, "--out", out)
    confirm(out)
    path = write_site(records.parent, records, SERVER, code_map="map.yaml")
    _, state, _ = with_key(path)
    done = CliRunner().invoke(app, ["run", str(path), "--dry-run", str(records.parent / "sent")])
    assert done.exit_code == 0, done.output
    files = [file for place in (records.parent / "sent", state.path) for file in place.rglob("*") if file.is_file()]
    assert len(files) >= 3
    for file in files:
        content = file.read_bytes()
        assert not any(word in content for word in (b"OURS//", b"Our seventh", b"confirmed"))


def test_what_a_person_wrote_is_kept(records: Path) -> None:
    """A second run keeps entries as they are, proposes for the rest, and overwrites nothing."""
    first, second = records.parent / "map.yaml", records.parent / "second.yaml"
    own = [
        {"site": "OURS//1", "study": "CODE//2", "confirmed": True},
        {"site": "OURS//2", "study": "CODE//9", "how": "parent"},
    ]
    first.write_text(yaml.safe_dump({"version": 1, "codes": own}))
    map_codes(records, "--out", second, code_map="map.yaml")
    codes = {entry.site: entry for entry in load(second, CodeMap).codes}
    assert (codes["OURS//1"].study, codes["OURS//1"].confirmed, codes["OURS//1"].how) == ("CODE//2", True, "person")
    assert (codes["OURS//2"].study, codes["OURS//2"].confirmed) == ("CODE//9", False)
    assert codes["OURS//3"].study == "CODE//3"
    with pytest.raises(ConfigurationError, match=r"second\.yaml: exists and is not overwritten"):
        map_codes(records, "--out", second)
    assert "written" not in map_codes(records)  # without --out: counts alone


def test_a_map_that_cannot_be_meant_is_one_clear_error(records: Path) -> None:
    """Two meanings of a code, a target that the study has not, an unknown word; never a code of the site."""
    path = write_site(records.parent, records, SERVER, code_map="map.yaml")
    entry = {"site": "OURS//SECRET", "study": "CODE//1", "confirmed": True}
    for codes, expected in (
        ([entry, dict(entry)], "codes: 1 entries repeat a code of the site"),
        ([entry | {"study": "CODE//0.5x"}], "1 confirmed entries under `codes` lead to no code of schema synthetic"),
        ([entry | {"how": "guess"}], "exact"),
        ([entry | {"confirmed": 1}], "a number stands for no answer"),
    ):
        (records.parent / "map.yaml").write_text(yaml.safe_dump({"version": 1, "codes": codes}))
        done = CliRunner().invoke(app, ["check", str(path)])
        assert isinstance(done.exception, ConfigurationError)
        assert expected in str(done.exception)
        assert "SECRET" not in str(done.exception)
    (records.parent / "map.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"map\.yaml: no such file"):
        open_records(load_site_file(path), write_study(records.parent).features)


def test_entries_apply_at_once(records: Path) -> None:
    """Two codes that are exchanged are exchanged: nothing is renamed twice, and facts, units and times stay."""
    schema = write_study(records.parent).features
    plain, swapped = (
        MedsDirectory(records, counts_as).events(schema).collect()
        for counts_as in (None, {"OURS//1": "OURS//2", "OURS//2": "OURS//1", "OURS//3": "OURS//1"})
    )
    expected = {"OURS//1": "OURS//2", "OURS//2": "OURS//1", "OURS//3": "OURS//1"}
    assert swapped["code"].to_list() == [expected.get(code, code) for code in plain["code"].to_list()]
    assert swapped.drop("code").equals(plain.drop("code"))


def test_one_patient_less_changes_nobody_elses_entries(records: Path) -> None:
    """Guarantee: whoever is removed, every entry for a code that others have is the same."""
    schema = write_study(records.parent).features
    path = records / "data" / "0.parquet"
    events = pl.read_parquet(path)
    events = pl.concat([events, events.filter(pl.col("subject_id") == 1).with_columns(code=pl.lit("code// 399"))])
    entries = []
    for some in (events, events.filter(pl.col("subject_id") != 1)):
        some.write_parquet(path)
        found = survey_codes(MedsDirectory(records), schema, About(), About(), there=CodeMap(version=1))
        entries.append({entry.site: entry for entry in found.new})
    left = set(some["code"].to_list())
    assert entries[1] == {code: entry for code, entry in entries[0].items() if code in left}
    assert set(entries[0]) - set(entries[1]) == {"code// 399"}


def test_opted_out_patients_are_in_no_count(records: Path) -> None:
    """A code that only they have is neither counted nor proposed."""
    path = records / "data" / "0.parquet"
    events = pl.read_parquet(path)
    odd = pl.when(pl.col("subject_id") == 1).then(pl.lit("code//399")).otherwise("code")
    events.with_columns(code=odd).write_parquet(path)
    (records.parent / "optouts.csv").write_text("subject_id\n1\n")
    map_codes(records, "--out", records.parent / "all.yaml")
    said = map_codes(records, "--out", records.parent / "map.yaml", exclude="optouts.csv")
    assert "code//399" in (records.parent / "all.yaml").read_text()
    assert "code//399" not in (records.parent / "map.yaml").read_text()
    assert f"{events.filter(pl.col('subject_id') != 1).height:,} events" in said


def test_codes_of_a_task_alone_go_to_labels(records: Path) -> None:
    """A code set that the study's inputs do not list is found by `--task`, and applies to labels, not to inputs."""
    path = records / "data" / "0.parquet"
    events = pl.read_parquet(path)
    events.with_columns(
        code=pl.when(pl.col("code") == "OURS//3").then(pl.lit("DX//I50.9")).otherwise("code")
    ).write_parquet(path)
    task = {"kind": "first_code", "codes": ["ICD10//{I50,I51}*"], "within_days": 30}
    (records.parent / "task.yaml").write_text(yaml.safe_dump({"version": 1, "name": "heart", "label": task}))
    out = records.parent / "map.yaml"
    map_codes(records, "--out", out, "--task", records.parent / "task.yaml")
    confirm(out)
    found = load(out, CodeMap)
    assert [(entry.site, entry.study, entry.how) for entry in found.labels] == [("DX//I50.9", "ICD10//I50", "parent")]
    assert found.of_labels["DX//I50.9"] == "ICD10//I50"
    assert "DX//I50.9" not in found.of_records
    found.check(write_study(records.parent).features, "map")


def test_any_text_of_a_hospital_survives_the_file(tmp_path: Path) -> None:
    """Quotes, braces, colons, line breaks and letters of any alphabet come back as they were, one entry a line."""
    odd = ['a: "b" {c}', "d # e", "- f", "yes", "1", "ä\u2028ö", "'", "\\", "x" * 256, "\U0001f489 g", "[", "h,i"]
    entries = [
        {"site": code, "study": "CODE//1", "how": "text", "confirmed": False, "means": "two\nlines: " + code}
        for code in odd
    ]
    written = CodeMap.model_validate({"version": 1, "codes": entries})
    assert write_map(tmp_path / "map.yaml", written, About(means={"CODE//1": "one\n\u2028\x07two"})) == 0
    assert load(tmp_path / "map.yaml", CodeMap) == written
    text = (tmp_path / "map.yaml").read_text()
    assert sum(line.startswith("  - {") for line in text.split("\n")) == len(odd)
    with pytest.raises(ConfigurationError, match="exists"):
        write_map(tmp_path / "map.yaml", written, About())


def test_a_map_too_large_to_be_read_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rarest, which stand last, are left out and counted; what is written can be read."""
    monkeypatch.setattr("client.mapping_survey.MAX_FILE_BYTES", 1000)
    entries = [{"site": f"A//{number}", "study": "B"} for number in range(50)]
    whole = CodeMap.model_validate({"version": 1, "codes": entries})
    left_out = write_map(tmp_path / "map.yaml", whole, About())
    kept = load(tmp_path / "map.yaml", CodeMap).codes
    assert len(kept) + left_out == 50
    assert left_out
    assert kept == whole.codes[: len(kept)]


def test_events_without_a_code_are_refused(records: Path) -> None:
    """As everywhere: one error that says how many."""
    path = records / "data" / "0.parquet"
    pl.read_parquet(path).with_columns(code=pl.lit(None, pl.String)).write_parquet(path)
    with pytest.raises(DataError, match="column `code` is null in"):
        map_codes(records)
