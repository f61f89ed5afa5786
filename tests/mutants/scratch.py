"""A scratch copy of the source tree in which mutants are tried; the working tree is never touched."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.mutants.mutant import Mutant, every_test_of
from tests.mutants.witness import WITNESS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("common", "client", "server", "simulations", "configs", "tests", "wardround.py", "pyproject.toml")
REWRITE = "ignore::pytest.PytestAssertRewriteWarning"  # warm.py has read Hypothesis before pytest could rewrite it
OPTIONS = [
    "-q",
    "-W",
    REWRITE,
    "-p",
    "tests.mutants.witness",
    "-p",
    "no:cacheprovider",
    "--no-header",
    "-m",
    "full or not full",
]


@dataclass(frozen=True)
class Run:
    """One run of pytest: its exit code, how each test ended, the last lines it printed."""

    code: int
    ended: dict[str, set[str]]
    said: str

    def of(self, test: str) -> list[set[str]]:
        """How the items of a test, one for each of its parameters, ended."""
        return [ended for item, ended in self.ended.items() if item == test or item.startswith(f"{test}[")]


class Scratch:
    """A copy of the product and its tests below `folder`, and a process that runs pytest on it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder.resolve() / "copy"
        for name in COPIED:
            source, target = ROOT / name, self.root / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)
        self._witness = self.root / "witness.jsonl"
        more = {"PYTHONPATH": str(self.root), WITNESS: str(self._witness), "OMP_NUM_THREADS": "1"}
        self._warm = subprocess.Popen(
            [sys.executable, str(self.root / "tests/mutants/warm.py")],
            cwd=self.root,
            env={**os.environ, **more},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._warm.communicate()  # end of input, and it ends

    def run(self, tests: Iterable[str]) -> Run:
        """Run these tests (ids below tests/) on the copy as it is now. Raises RuntimeError if they ran elsewhere."""
        self._witness.unlink(missing_ok=True)
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        print(json.dumps([*OPTIONS, *(f"tests/{test}" for test in tests)]), file=self._warm.stdin, flush=True)
        code = int(self._warm.stdout.readline())
        said = (self.root / "said.txt").read_text(encoding="utf-8")[-3000:]
        lines = [json.loads(line) for line in self._witness.read_text().splitlines()] if self._witness.exists() else []
        products = {line["product"] for line in lines if "product" in line}
        if products != {str(self.root)}:
            raise RuntimeError(f"the tests ran on {products}, not on the copy {self.root}: {said}")
        ended: dict[str, set[str]] = {}
        for line in lines:
            if "test" in line:
                ended.setdefault(line["test"].removeprefix("tests/"), set()).add(line["ended"])
        return Run(code, ended, said)

    @contextmanager
    def with_mistake(self, mutant: Mutant) -> Iterator[None]:
        """The copy has the mistake, and afterwards no longer. Raises StaleMutantError."""
        mistaken = mutant.sources(self.root)
        kept = {file: (self.root / file).read_bytes() for file in mistaken}
        try:
            for file, text in mistaken.items():
                self._put(file, text.encode())
            yield
        finally:
            for file, content in kept.items():
                self._put(file, content)

    def _put(self, file: str, content: bytes) -> None:
        """Python trusts compiled code of the same second and size, which a changed digit leaves as they were."""
        path = self.root / file
        path.write_bytes(content)
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def unmutated(self, mutants: Iterable[Mutant]) -> str:
        """What goes wrong without any mistake: nothing, "", if all tests of these mutants pass."""
        tests = every_test_of(mutants)
        run = self.run(tests)
        wrong = [f"{test} was not collected" for test in tests if not run.of(test)]
        wrong += [f"{test}: {ended}" for test, ended in run.ended.items() if ended != {"passed"}]
        return "\n".join([*wrong, run.said]) if wrong or run.code != 0 else ""

    def verdict(self, mutant: Mutant) -> str:
        """What happened instead of every named test failing by assertion: nothing, "", if they did."""
        with self.with_mistake(mutant):
            run = self.run(mutant.tests)
        wrong = [f"{test} was not collected" for test in mutant.tests if not run.of(test)]
        wrong += [f"{test} did not fail" for test in mutant.tests if "assertion" not in set().union(*run.of(test))]
        broken = {test: ended - {"passed", "assertion"} for test, ended in run.ended.items()}
        wrong += [f"{test} broke instead of failing: {ended}" for test, ended in broken.items() if ended]
        return "\n".join([*wrong, f"exit code {run.code}", run.said]) if wrong or run.code != 1 else ""
