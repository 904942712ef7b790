"""Bars on stderr for a person who watches; nothing where nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Bars:
    """A bar per piece of work, gone when it is done. Implements `trainer.progress.Progress`."""

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """See `trainer.progress.Progress`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(what, total=total)
            yield lambda units: bars.advance(task, units)
