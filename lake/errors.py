"""What can go wrong at the lake. The class says what the caller can do (see `contract.errors`)."""

from __future__ import annotations

from contract.errors import HeadwaterError, TemporaryError


class StoreUnavailableError(TemporaryError):
    """The store did not answer, refused, or answered too late. Of a write this means: it is not known whether it
    happened.

    Keep what you hold, look again what is there, then try again.
    """


class CommitConflictError(TemporaryError):
    """Somebody else committed first what this commit depends on. Nothing was written: refresh, check again, try
    again."""


class ObjectMissingError(HeadwaterError):
    """An object or a table that was asked for is not in the lake."""


class UnknownNameError(HeadwaterError):
    """A stream, a release, a rollout … was asked for by a name that the lake does not have. Ask for another: the
    message says where those there are can be seen."""


class CorruptLakeError(HeadwaterError):
    """What stands in the lake contradicts itself. Give up: a person must look at it; the message names the object."""


class QueryError(HeadwaterError):
    """A question cannot be answered as it was asked. Ask differently: the message says what is wrong."""


class NoSuchVersionError(QueryError):
    """A question is about a version that its table never had."""


class UnknownStreamError(QueryError, UnknownNameError):
    """A question names a stream that the lake does not have."""
