"""What can go wrong while a stack starts, runs and stops; the class says what the caller can do."""

from __future__ import annotations

from contract.errors import ConfigurationError, HeadwaterError, TemporaryError


class ProgramMissing(ConfigurationError):
    """A program that the stack starts is not installed. A person must install it; the message says how."""


class NoFreePort(ConfigurationError):
    """No free port was found within the bounds of the search."""


class FolderInUse(ConfigurationError):
    """Another stack runs over the same data folder."""


class NotReady(TemporaryError):
    """A server does not answer yet, or not correctly. Ask again."""


class StartFailed(HeadwaterError):
    """A child did not become ready in the time or the number of starts allowed. Its log says why."""


class StopFailed(HeadwaterError):
    """A child is still there after SIGKILL and its deadline."""
