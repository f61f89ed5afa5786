"""Does a test notice each known mistake? Writes it into a copy of the source and runs the tests that must fail.

    python -m tests.mutants                  all of them
    python -m tests.mutants --fast           those that .ci/run tries
    python -m tests.mutants --only NAME      one, or several
    python -m tests.mutants --write-table    make the table of docs/pitfalls.md anew, and run nothing

Exit code 1 if a mutant survived, broke instead of being caught, or no longer fits the source.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants import page
from tests.mutants.catalogue import MUTANTS
from tests.mutants.scratch import Scratch


def main() -> int:
    """Try the mutants asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[mutant.name for mutant in MUTANTS], metavar="NAME")
    parser.add_argument("--write-table", action="store_true")
    asked = parser.parse_args()
    if asked.write_table:
        page.write(MUTANTS)
        return 0
    mutants = [m for m in MUTANTS if (m.fast or not asked.fast) and (not asked.only or m.name in asked.only)]
    with tempfile.TemporaryDirectory() as folder, Scratch(Path(folder)) as scratch:
        if wrong := scratch.unmutated(mutants):
            print(f"without any mistake: {wrong}")
            return 1
        survivors = 0
        for mutant in mutants:
            start = time.monotonic()
            wrong = scratch.verdict(mutant)
            survivors += bool(wrong)
            print(
                f"{'NOT CAUGHT' if wrong else 'caught':10}  {mutant.name} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
            if wrong:
                print(wrong, flush=True)
        print(f"{len(mutants) - survivors} of {len(mutants)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
