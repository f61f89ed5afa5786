"""A site's codes against a study: how much of its events is known, and the code map that could be.

Exact counts, for this hospital's eyes alone; none of them is written into the map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from client.mapping import CodeMap, Entry, known
from client.mapping_proposals import About, Targets
from client.readers.meds import MedsDirectory
from common.errors import ConfigurationError
from common.keys import write_private
from common.schema import CODE, FeatureSchema
from common.terms import MAX_FILE_BYTES

HEADER = """\
# Which of this hospital's codes count as which of the study's. Private: it stays on this machine.
# Look at each line: does the code mean the same here? Then write `confirmed: true`; an entry without it is not applied.
# Correct `study`, remove lines, or add your own (`how: person`). A number must also have the study's unit.
# Decide by what a code means, not by who has it. The most frequent codes stand first.
version: 1
"""


@dataclass(frozen=True)
class Survey:
    """What `survey_codes` found.

    Attributes:
        events: code of the site -> number of events, most frequent first.
        before, confirmed, proposed: share of events with a code of the study: without a map, with what is confirmed,
            and if every entry were confirmed.
        unknown: codes that the study does not read and for which there is no entry.
        code_map: the entries that were there before, then the proposals.
        new: of the proposals.
    """

    events: Mapping[str, int]
    before: float
    confirmed: float
    proposed: float
    unknown: int
    code_map: CodeMap
    new: tuple[Entry, ...]


def survey_codes(
    directory: MedsDirectory,
    schema: FeatureSchema,
    site: About,
    study: About,
    *,
    there: CodeMap,
    asked: tuple[str, ...] = (),
) -> Survey:
    """Count codes and propose entries for those that the study does not read.

    Args:
        directory: the records with the site's own codes, without those who opted out.
        schema: the study's inputs.
        site, study: the two tables of codes.
        there: entries that are kept as they are.
        asked: codes of a task's code sets; what is found for them alone goes to `labels`.

    Raises:
        DataError: events that cannot be used, or none.
    """
    directory.coverage(schema)  # refuses missing codes and the like
    counted = directory.events(schema).group_by(CODE).len().sort("len", CODE, descending=[True, False]).collect()
    events = dict(counted.iter_rows())
    read = known(events, schema)
    targets, for_labels = Targets.of(schema, study), Targets(asked, asked, study)
    mapped, mapped_for_labels = ({entry.site for entry in some} for some in (there.codes, there.labels))
    codes, labels = [], []
    for code in events:
        if code in read or code in mapped:
            continue
        entry = targets.propose(code, site)
        if entry is not None:
            codes.append(entry)
        elif code not in mapped_for_labels and code not in asked:
            entry = for_labels.propose(code, site)
            labels += [entry] if entry is not None else []
    whole = CodeMap(version=1, codes=(*there.codes, *codes), labels=(*there.labels, *labels))
    every = {entry.site: entry.study for entry in whole.codes}
    return Survey(
        events,
        before=_share(events, {}, schema),
        confirmed=_share(events, there.of_records, schema),
        proposed=_share(events, every, schema),
        unknown=len(set(events) - read - set(every) - {entry.site for entry in whole.labels}),
        code_map=whole,
        new=(*codes, *labels),
    )


def _share(events: Mapping[str, int], counts_as: Mapping[str, str], schema: FeatureSchema) -> float:
    as_read: Counter[str] = Counter()
    for code, count in events.items():
        as_read[counts_as.get(code, code)] += count
    return sum(as_read[code] for code in known(as_read, schema)) / max(1, as_read.total())


def write_map(path: Path, code_map: CodeMap, study: About) -> int:
    """Write the file, for its owner alone; returns how many entries did not fit.

    Raises:
        ConfigurationError: the file exists or cannot be written.
    """
    text, left_out = HEADER, 0
    for name, entries in (("codes", code_map.codes), ("labels", code_map.labels)):
        text += f"{name}:\n" if entries else f"{name}: []\n"
        for entry in entries:
            line = _line(entry, study)
            fits = len(text.encode()) + len(line.encode()) < MAX_FILE_BYTES
            text, left_out = (text + line, left_out) if fits else (text, left_out + 1)
    try:
        write_private(path, text.encode())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    return left_out


def _line(entry: Entry, study: About) -> str:
    """One entry on one line, so that a person can also work on it with an editor's search."""
    plain = {name: value for name, value in entry.model_dump().items() if value is not None}
    said = yaml.safe_dump(plain, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False).strip()
    means = " ".join("".join(c if c.isprintable() else " " for c in study.means.get(entry.study, "")).split())
    return f"  - {said}" + (f"  # {means}\n" if means else "\n")
