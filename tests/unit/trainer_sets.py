"""Window sets out of nothing, for tests of what comes after the dataset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from trainer.recipe import Recipe
from trainer.recipe_file import parse_recipe
from trainer.windowset import WindowMeta, WindowSet

STEP_US = 20_000


def recipe(**tables: Any) -> Recipe:
    """A recipe of windows of 4 x 2, every second one overlapping."""
    base: dict[str, Any] = {
        "name": "test",
        "task": "classification",
        "data": {"stream": "s", "fields": ["x", "y"]},
        "labels": {"stream": "l"},
        "window": {"rows": 4, "stride": 2, "gap_s": 1.0},
        "search": {"metric": "f1_macro"},
        "checks": {"windows_min": 1},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table} if isinstance(table, dict) else table
    if base["labels"] is None:
        del base["labels"]
    return parse_recipe(base, "test")


def window_set(counts: dict[str, int], classes: tuple[str, ...] = ("a", "b"), seed: int = 1) -> WindowSet:
    """Windows of some groups, one device each, labels in turn; all devices over the same time.

    Args:
        counts: windows by group.
        classes: of the labels; none: no labels.
        seed: of the values.
    """
    total = sum(counts.values())
    numbers = np.concatenate([np.arange(count) for count in counts.values()])
    starts = 1_700_000_000_000_000 + numbers * 2 * STEP_US
    groups = np.repeat(list(counts), list(counts.values()))
    values = np.random.default_rng(seed).normal(size=(total, 4, 2)).astype(np.float32)
    labels = np.array([classes[number % len(classes)] for number in numbers]) if classes else None
    meta = WindowMeta(
        fields=("x", "y"), dtypes=("float32", "float32"), classes=classes, sample_rate_hz=50.0, streams={"s": 1}
    )
    return WindowSet(values, labels, groups, groups, starts, starts + 3 * STEP_US, meta)


def with_labels(dataset: WindowSet, labels: list[str]) -> WindowSet:
    """The same windows with other labels."""
    meta = msgspec.structs.replace(dataset.meta, classes=tuple(sorted(set(labels) - {""})))
    return replace(dataset, labels=np.array(labels), meta=meta)
