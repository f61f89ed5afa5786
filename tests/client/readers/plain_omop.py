"""The rules for an OMOP CDM once more, slowly: one row at a time, in plain Python, for CSV of one dialect."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from datetime import datetime, time
from pathlib import Path

Event = tuple[int, datetime | None, str, float | None]
Row = dict[str, str]

TABLES = (  # table, prefix, concept column, source column, type column, time stem, number column
    ("condition_occurrence", "CONDITION", "condition", "condition_start", ""),
    ("procedure_occurrence", "PROCEDURE", "procedure", "procedure", ""),
    ("drug_exposure", "DRUG", "drug", "drug_exposure_start", "quantity"),
    ("device_exposure", "DEVICE", "device", "device_exposure_start", ""),
    ("measurement", "MEASUREMENT", "measurement", "measurement", "value_as_number"),
    ("observation", "OBSERVATION", "observation", "observation", "value_as_number"),
    ("specimen", "SPECIMEN", "specimen", "specimen", ""),
    ("visit_detail", "VISIT_DETAIL", "visit_detail", "visit_detail_start", ""),
)


def rows_of(folder: Path, table: str) -> list[Row]:
    """The table's rows; none if it is absent."""
    for path, opener in ((folder / f"{table}.csv", open), (folder / f"{table}.csv.gz", gzip.open)):
        if path.is_file():
            with opener(path, "rt", encoding="utf-8", newline="") as file:
                return [{k: (v or "").strip() for k, v in row.items()} for row in csv.DictReader(file)]
    return []


def moment(row: Row, stem: str) -> datetime | None:
    """A time, or the end of a day of which only the date is known."""
    text = row.get(f"{stem}_datetime") or row.get(f"{stem}_date") or ""
    if not text:
        return None
    found = datetime.fromisoformat(text)
    return found if found.time() != time() else found.replace(hour=23, minute=59, second=59)


def code(row: Row, prefix: str, concept: str, source: str) -> str | None:
    """The concept, or what stands in its place."""
    if row.get(concept) not in (None, "", "0"):
        return f"{prefix}//{row[concept]}"
    return f"{prefix}//SOURCE//{row[source]}" if row.get(source) else None


def events_of_cdm(folder: Path, billing: set[int], charted: set[int]) -> Iterator[Event]:
    """All events, in no particular order."""
    for row in rows_of(folder, "person"):
        patient = int(row["person_id"])
        year, month, day = (int(row[f"{part}_of_birth"] or 1) for part in ("year", "month", "day"))
        yield patient, datetime(year, month, day), "MEDS_BIRTH", None
        for prefix in ("gender", "race", "ethnicity"):
            fact = code(row, prefix.upper(), f"{prefix}_concept_id", f"{prefix}_source_value")
            if fact:
                yield patient, None, fact, None
    ends: dict[str, datetime | None] = {}
    for row in rows_of(folder, "visit_occurrence"):
        patient, kind = int(row["person_id"]), row["visit_concept_id"]
        ends[row["visit_occurrence_id"]] = moment(row, "visit_end")
        there = {"VISIT_START": moment(row, "visit_start"), "VISIT_END": moment(row, "visit_end")}
        for prefix, when in there.items():
            if when and kind != "0":
                yield patient, when, f"{prefix}//{kind}", None
        to = next((row[c] for c in ("discharged_to_concept_id", "discharge_to_concept_id") if c in row), "")
        named = next((row[c] for c in ("discharged_to_source_value", "discharge_to_source_value") if c in row), "")
        place = code({"c": to, "s": named}, "DISCHARGED_TO", "c", "s")
        if place and there["VISIT_END"]:
            yield patient, there["VISIT_END"], place, None
    for table, prefix, stem, start, number in TABLES:
        for row in rows_of(folder, table):
            source = "" if table == "visit_detail" else f"{stem}_source_value"  # there it is a visit's number
            when, name = moment(row, start), code(row, prefix, f"{stem}_concept_id", source)
            type_ = int(row.get(f"{stem}_type_concept_id") or 0)
            waits = type_ in billing or (prefix == "CONDITION" and type_ not in charted)
            if waits and row.get("visit_occurrence_id"):
                end = ends.get(row["visit_occurrence_id"])
                when = None if end is None else max(end, when or end)
            if when is None or name is None:
                continue
            value = float(row[number]) if number and row.get(number) else None
            if table in ("measurement", "observation") and row.get("unit_concept_id") not in (None, "", "0"):
                name += f"//{row['unit_concept_id']}"
            elif row.get("unit_source_value") and table in ("measurement", "observation"):
                name += f"//{row['unit_source_value']}"
            if (
                table in ("measurement", "observation")
                and value is None
                and row.get("value_as_concept_id") not in (None, "", "0")
            ):
                name += f"//VALUE//{row['value_as_concept_id']}"
            yield int(row["person_id"]), when, name, value
    for row in rows_of(folder, "death"):
        when = moment(row, "death")
        if when:
            yield int(row["person_id"]), when, "MEDS_DEATH", None
