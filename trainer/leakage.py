"""What the two sides of a split say of each other: groups, windows and classes that are where they must not be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from trainer.findings import NAMED_MAX, Finding, ok
from trainer.progress import Progress
from trainer.recipe import Recipe, Thresholds
from trainer.split import Split
from trainer.windowset import WindowSet


def check_split(recipe: Recipe, dataset: WindowSet, split: Split, progress: Progress) -> list[Finding]:
    """What can be said of the two sides."""
    return [
        _group_leakage(recipe, dataset, split),
        _window_leakage(recipe.checks, dataset, split, progress),
        _classes_on_both_sides(recipe, dataset, split),
    ]


def _group_leakage(recipe: Recipe, dataset: WindowSet, split: Split) -> Finding:
    both = sorted(set(dataset.groups[split.train].tolist()) & set(dataset.groups[split.test].tolist()))
    detail = f"{len(split.train)} windows train, {len(split.test)} judge; {split.description}"
    if recipe.split.by in ("device", "group"):
        if not both:
            return ok("groups", detail, both=both)
        return Finding(
            check="groups",
            verdict="fail",
            detail=f"{', '.join(both[:NAMED_MAX])} on both sides",
            figures={"both": both},
            remedy="the split is wrong; report this with the recipe",
        )
    if recipe.split.by == "random":
        return Finding(
            check="groups",
            verdict="warn",
            detail=f"{detail}; {len(both)} groups are on both sides",
            figures={"both": both[:100]},
            remedy='the figures are too good for devices that the model has never seen; use by = "device" or "group"',
        )
    return ok("groups", f"{detail}; the same devices, later", both=both[:100])


def _window_leakage(limits: Thresholds, dataset: WindowSet, split: Split, progress: Progress) -> Finding:
    with progress.track("looking for windows on both sides", len(split.train) + len(split.test)) as advance:
        learned = set(_digests(dataset, split.train.tolist(), advance))
        repeated = sum(one in learned for one in _digests(dataset, split.test.tolist(), advance))
    if repeated <= limits.identical_windows_max:
        return ok("leakage", f"{repeated} windows are the same on both sides", identical=repeated)
    return Finding(
        check="leakage",
        verdict="fail",
        detail=f"{repeated} of {len(split.test)} test windows are, to the bit, among the training windows",
        figures={"identical": repeated},
        remedy="is a recording replayed, or a sensor stuck? Take it once ([data] sql), put both into one [split] "
        "group, or raise [checks] identical_windows_max",
    )


def _digests(dataset: WindowSet, numbers: Iterable[int], advance: Callable[[int], None]) -> Iterable[bytes]:
    for number in numbers:
        yield hashlib.blake2b(np.ascontiguousarray(dataset.windows[number]).data, digest_size=16).digest()
        advance(1)


def _classes_on_both_sides(recipe: Recipe, dataset: WindowSet, split: Split) -> Finding:
    if dataset.labels is None or recipe.task == "anomaly":
        return ok("classes", "none are learned")
    train, test = (Counter(dataset.labels[side].tolist()) for side in (split.train, split.test))
    figures = {"train": dict(train), "test": dict(test)}
    if unknown := sorted(set(test) - set(train)):
        return Finding(
            check="classes",
            verdict="fail",
            detail=f"{', '.join(unknown[:NAMED_MAX])} is only on the test side: it cannot be learned",
            figures=figures,
            remedy="choose other test groups ([split] test_groups or seed), or collect more groups with that class",
        )
    if unjudged := sorted(set(train) - set(test)):
        return Finding(
            check="classes",
            verdict="warn",
            detail=f"{', '.join(unjudged[:NAMED_MAX])} is only on the training side: nothing judges it",
            figures=figures,
            remedy="choose other test groups ([split] test_groups or seed), or a larger test share",
        )
    return ok("classes", f"all {len(train)} classes are on both sides", **figures)
