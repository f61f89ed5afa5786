"""How much of diabetes130 a code map recovers from a hospital that heads its diagnoses otherwise, and in what time.

    python -m tests.benchmarks.map_codes --data FOLDER      # one MEDS directory per site

The diagnoses of one site are rewritten from `DIAG//428` to `DIAGNOSIS//ICD//9//428`, as another hospital has them.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from client.mapping import CodeMap
from client.mapping_proposals import About
from client.mapping_survey import survey_codes
from client.readers.meds import MedsDirectory
from common.study import load_study

STUDY = Path(__file__).resolve().parents[2] / "configs" / "diabetes130.yaml"


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--site", default="payer_missing")
    chosen = parser.parse_args()
    with TemporaryDirectory() as place:
        records = Path(shutil.copytree(chosen.data / chosen.site, Path(place) / "records"))
        for shard in MedsDirectory(records).shards:
            events = pl.read_parquet(shard)
            renamed = pl.col("code").str.replace("^DIAG//", "DIAGNOSIS//ICD//9//")
            events.with_columns(renamed).write_parquet(shard)
        began = time.process_time()
        found = survey_codes(
            MedsDirectory(records), load_study(STUDY).features, About(), About(), there=CodeMap(version=1)
        )
        seconds = time.process_time() - began
    kinds = {how: sum(entry.how == how for entry in found.new) for how in ("exact", "parent", "text")}
    print(f"{chosen.site}: {sum(found.events.values()):,} events of {len(found.events):,} codes, {seconds:.1f} CPU s")
    print(f"known {found.before:.1%}, with every entry {found.proposed:.1%}; proposed {kinds}")


if __name__ == "__main__":
    main()
