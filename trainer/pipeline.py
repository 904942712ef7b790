"""The steps in their order, and what each depends on."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from trainer.steps import StepFunction


class Step(NamedTuple):
    """One step as the pipeline knows it."""

    name: str
    function: str
    """`module:name`, imported when the step runs."""
    needs: tuple[str, ...]
    """Steps whose outputs it reads."""
    reads: tuple[str, ...]
    """Keys of the recipe that decide what comes out; a change of any other does not make it run again."""

    def load(self) -> StepFunction:
        """The function behind it."""
        module, _, name = self.function.partition(":")
        found: StepFunction = getattr(import_module(module), name)
        return found


_SHAPE = ("name", "task", "data", "labels", "window", "split")
STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        Step("dataset", "trainer.dataset:step", (), (*_SHAPE,)),
        Step("checks", "trainer.checks:step", ("dataset",), ("task", "seed", "split", "checks")),
        Step("search", "trainer.search:step", ("checks",), ("task", "seed", "features", "families", "search")),
        Step("evaluate", "trainer.evaluate:step", ("search",), ("task", "seed", "search", "report")),
        Step("export", "trainer.export:step", ("search",), ("task", "seed", "window", "limits")),
        Step("release", "trainer.release:step", ("evaluate", "export"), ("name", "limits", "policy")),
    )
}
