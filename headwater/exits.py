"""What the exit status of `headwater` says, and which error gives which."""

from __future__ import annotations

from enum import IntEnum

from contract.errors import ConfigurationError, HeadwaterError, Rejected, TemporaryError
from lake.errors import QueryError, UnknownNameError


class Exit(IntEnum):
    """The exit statuses: a contract for scripts and service managers."""

    OK = 0
    FAILED = 1
    """A check failed: rows lost or doubled, a finding of `doctor`; or something went wrong that neither waiting nor
    another configuration mends."""
    USAGE = 2
    """The command line, a setting or a query is wrong, names what does not exist, or something is not installed: change
    it before trying again."""
    UNAVAILABLE = 3
    """Something outside did not answer: try again later."""
    INTERRUPTED = 130
    """Ended by Ctrl-C before there was a result."""


def exit_of(error: HeadwaterError) -> Exit:
    """The exit status of an error."""
    if isinstance(error, ConfigurationError | Rejected | QueryError | UnknownNameError):
        return Exit.USAGE
    if isinstance(error, TemporaryError):
        return Exit.UNAVAILABLE
    return Exit.FAILED
