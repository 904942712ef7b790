"""How far a step is: a port that the command line fills with bars, and a null object for everybody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Somebody watches."""

    def track(self, what: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Watch one piece of work.

        Args:
            what: in a few words.
            total: how many units it has; None where nobody knows.

        Returns:
            Around the work: call the function with the number of further units that are done.
        """
        ...


class NoProgress:
    """Nobody watches."""

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """See `Progress`."""
        yield lambda units: None


NOBODY = NoProgress()
