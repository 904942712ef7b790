"""The steps in their order, and what each depends on."""

from __future__ import annotations

from trainer.steps import Step

DATASET = Step(
    "dataset",
    "trainer.dataset:step",
    (),
    ("name", "task", "data", "labels", "window", "split", "checks.stuck_s"),
    pins="trainer.dataset:pins",
)
CHECKS = Step("checks", "trainer.checks:step", (DATASET,), ("task", "split", "window", "checks"))
SEARCH = Step(
    "search",
    "trainer.search:step",
    (DATASET, CHECKS),
    ("task", "window", "features", "families", "search"),
    after="trainer.trials:forget",
)
EVALUATE = Step(
    "evaluate",
    "trainer.evaluate:step",
    (DATASET, CHECKS, SEARCH),
    ("name", "task", "window", "search", "labels", "report"),
    after="trainer.evaluate:tell",
)
EXPORT = Step("export", "trainer.export:step", (DATASET, CHECKS, SEARCH), ("name", "task", "data", "window", "limits"))
RELEASE = Step(
    "release",
    "trainer.release:step",
    (DATASET, EVALUATE, EXPORT),
    ("name", "limits", "policy", "search"),
    reads_text=True,  # the manifest holds it
)

STEPS: dict[str, Step] = {step.name: step for step in (DATASET, CHECKS, SEARCH, EVALUATE, EXPORT, RELEASE)}
"""By name, each after those it needs."""
