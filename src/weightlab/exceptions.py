"""Errors that a user of weightlab can act on.

Each message names what was given, the value, and the mend, in one or two lines. The command line
prints the message alone and exits with the class's `exit_code`.
"""


class WeightlabError(Exception):
    """Base of every error raised on purpose for a reason outside the code's own logic."""

    exit_code = 1


class UsageError(WeightlabError):
    """The request itself is wrong: an unknown name, a value out of range, an unusable file."""

    exit_code = 2


class TaskError(WeightlabError):
    """A task does not do what a trial needs (its loss is not a scalar, its data is missing, ...)."""


class StoreError(WeightlabError):
    """The trial store cannot be read or written: foreign, truncated, read-only, or disk full."""


class TrialError(WeightlabError):
    """A trial cannot be brought to an end, e.g. its baseline failed in every tuning run."""


class MissingDependencyError(WeightlabError, ImportError):
    """An optional dependency is needed and not installed; the message names the extra."""

    exit_code = 2
