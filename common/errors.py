"""Every error that wardround raises on purpose.

    WardroundError
    ├── ConfigurationError   a study, site or feature file cannot be used
    │   └── PlanError        a privacy plan that cannot exist or cannot be priced
    ├── DataError            records that cannot be used
    ├── PolicyError          the site's own limits refuse a study
    ├── BudgetError          the site's ledger refuses a charge
    ├── LedgerError          the ledger's file cannot be used: damaged, in use, full
    │   └── RollbackError    the ledger is older than what has been seen of it
    ├── WireError            a message that is not what was agreed
    └── DeviceError          a device that was asked for and is not there

A message names the value, the bound and the remedy. It never carries a patient's value or identifier:
what a person may read in a log, a person may send on.
"""


class WardroundError(Exception):
    """Root of the tree. `str(error)` is one line fit for a person."""


class ConfigurationError(WardroundError):
    """A study, site or feature file is wrong: unknown key, wrong type, value out of range."""


class PlanError(ConfigurationError):
    """A privacy plan that cannot exist (q > 1, delta too large) or cannot be priced."""


class DataError(WardroundError):
    """Records that cannot be used: names file, column and count, never a value of a patient."""


class PolicyError(WardroundError):
    """The hospital's own limits refuse a study: names the term, what it asks for and the limit."""


class BudgetError(WardroundError):
    """The ledger refuses a charge: names what was asked, what is left and the cap."""


class LedgerError(WardroundError):
    """The ledger cannot be read or written, so nothing is trained: damaged, in use by another, no space left."""


class RollbackError(LedgerError):
    """The ledger was put back to an older copy, or its anchor is not what it should be."""


class WireError(WardroundError):
    """A message with other keys, shapes, versions or digests than agreed."""


class DeviceError(WardroundError):
    """A compute device that the configuration names and the machine does not have."""
