"""One step of the trainer: what it sees, what it leaves, and when it need not run again.

A step is a function `(StepContext) -> outputs`: it reads what earlier steps published, writes its files into
`context.into`, and returns what is worth recording, as JSON. `run_step` gives it a fresh draft folder, and only when it
returned puts the draft in the place of the published folder and writes the record, in this order: a step that dies at
any moment leaves the published state as it was, or one that the record does not describe, and is run again.

    <work>/<recipe>/<step>/        what the step published
    <work>/<recipe>/<step>.json    its record, which names every file by hash
    <work>/<recipe>/.<step>.draft  what a running, or killed, step has written
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lake.query import Lake
from lake.store import Store
from trainer.progress import NOBODY, Progress
from trainer.recipe import Recipe
from trainer.split import Split
from trainer.windowset import WindowSet

Outputs = dict[str, Any]


@dataclass(frozen=True)
class StepContext:
    """What a step may use."""

    recipe: Recipe
    work: Path
    """`<work>/<recipe name>`."""
    lake: Lake
    store: Store
    seed: int
    progress: Progress = NOBODY
    recipe_text: str = ""
    """The file as it is, for the manifest."""
    code: str = ""
    """Revision of the source, or the version that is installed."""
    into: Path = Path()
    """Where the step that runs writes its files."""

    def folder(self, step: str) -> Path:
        """What an earlier step published.

        Raises:
            StepNotReadyError: it has not run.
        """
        raise NotImplementedError

    def outputs(self, step: str) -> Outputs:
        """What an earlier step returned.

        Raises:
            StepNotReadyError: it has not run.
        """
        raise NotImplementedError

    def windows(self) -> WindowSet:
        """The dataset."""
        return WindowSet.load(self.folder("dataset"))

    def split(self) -> Split:
        """The split that the checks found sound."""
        raise NotImplementedError


StepFunction = Callable[[StepContext], Outputs]
