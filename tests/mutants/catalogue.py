"""All mutants, in the order of docs/pitfalls.md."""

from __future__ import annotations

from tests.mutants import leaks, ledger, price, sampling, step
from tests.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *step.MUTANTS,
    *sampling.MUTANTS,
    *price.MUTANTS,
    *ledger.MUTANTS,
    *leaks.MUTANTS,
)
