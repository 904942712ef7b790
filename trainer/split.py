"""Which windows train, which judge, and the folds in between. Pure; the same seed draws the same split."""

from __future__ import annotations

from bisect import bisect_left
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError
from trainer.recipe import TEST_SHARE_MAX, Recipe, SplitRule
from trainer.windowset import WindowSet

Int64s = npt.NDArray[np.int64]

SPLIT_FILE = "split.npz"
_SIDES = ("train", "valid")
_DRAWS = 200
"""Choices of test groups that are compared."""
_NAMED_MAX = 12


class Fold(NamedTuple):
    """One turn of the cross-validation: indices into the whole window set."""

    train: Int64s
    valid: Int64s


class Split(NamedTuple):
    """Indices into a window set; no index is on two sides."""

    train: Int64s
    test: Int64s
    folds: list[Fold]
    """Within `train`."""
    description: str
    """Of the test side, for people and for `contract.models.Metric.split`: `test: group in (s03, s07)`."""


def split_windows(dataset: WindowSet, recipe: Recipe, seed: int) -> Split:
    """Divide a dataset by the recipe's rule.

    By `device` or `group`: whole groups judge, drawn so that their windows come nearest to the share that was asked
    for, and no class is left without training windows where that can be helped. By `time`: what begins after a moment
    judges, what ends before it trains; windows within one window's duration before the moment do neither, so that no
    reading is on both sides nor next to it. By `random`: single windows.

    Args:
        dataset: at least one window.
        recipe: its `split`, `window` and `task`.
        seed: of what is drawn.

    Raises:
        DataError: the windows cannot be divided so; the message says what to do.
    """
    rule = recipe.split
    everything = np.arange(len(dataset), dtype=np.int64)
    if rule.by == "time":
        train, test, since = _by_time(dataset, everything, rule.test)
        description = f"test: windows since {_moment(since)}"
        folds = _time_folds(dataset, train, rule.folds)
    elif rule.by == "random":
        drawn = np.random.default_rng(seed).permutation(len(dataset))
        count = max(1, int(len(dataset) * rule.test))
        train, test = np.sort(drawn[count:]), np.sort(drawn[:count])
        description = f"test: {len(test)} windows drawn at random with seed {seed}"
        folds = _random_folds(train, rule.folds, seed)
    else:
        chosen = _test_groups(dataset, rule, seed)
        judged = np.isin(dataset.groups, chosen)
        train, test = everything[~judged], everything[judged]
        description = f"test: {rule.by} in ({', '.join(chosen)})"
        folds = _group_folds(dataset, train, recipe, seed)
    _check_shares(len(train), len(test), rule)
    return Split(train, test, folds, description)


def _by_time(dataset: WindowSet, among: Int64s, share: float) -> tuple[Int64s, Int64s, int]:
    """Train, test, and the earliest moment between them that leaves no more than the share to the test,
    microseconds since 1970-01-01 UTC."""
    starts, ends = dataset.starts_us[among], dataset.ends_us[among]
    embargo = int(np.median(ends - starts))
    moments = np.unique(starts)

    def is_late_enough(moment: int) -> bool:
        test = int((starts >= moment).sum())
        return test <= share * (test + int((ends < moment - embargo).sum()))

    # The later the moment, the less is left to the test: the first that is late enough is found by bisection.
    since = int(moments[bisect_left(moments, True, hi=len(moments) - 1, key=is_late_enough)])
    return among[ends < since - embargo], among[starts >= since], since


def _time_folds(dataset: WindowSet, train: Int64s, count: int) -> list[Fold]:
    """Forward in time: each fold learns from what lies before what it is judged by."""
    order = train[np.argsort(dataset.starts_us[train], kind="stable")]
    folds = []
    for number in range(count):
        end = (number + 2) * len(order) // (count + 1)
        past = order[:end]
        if len(past) < 2:
            continue
        learn, valid, _ = _by_time(dataset, past, 1 / (number + 2))
        if len(learn) and len(valid):
            folds.append(Fold(np.sort(learn), np.sort(valid)))
    return _at_least_one(folds, "take more rows, or fewer [split] folds")


def _random_folds(train: Int64s, count: int, seed: int) -> list[Fold]:
    parts = np.array_split(np.random.default_rng(seed + 1).permutation(train), count)
    folds = [Fold(np.sort(np.setdiff1d(train, part)), np.sort(part)) for part in parts if 0 < len(part) < len(train)]
    return _at_least_one(folds, "take more rows")


def _group_folds(dataset: WindowSet, train: Int64s, recipe: Recipe, seed: int) -> list[Fold]:
    """Every group judges once; with one group alone, forward in time."""
    groups = dataset.groups[train]
    count = min(recipe.split.folds, len(np.unique(groups)))
    if count < 2:
        return _time_folds(dataset, train, recipe.split.folds)
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    if recipe.task == "classification" and dataset.labels is not None:
        labels = dataset.labels[train]
        smallest = int(np.unique(labels, return_counts=True)[1].min())
        if smallest >= count:
            splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
            parts = list(splitter.split(groups, labels, groups))
            return [Fold(train[learn], train[valid]) for learn, valid in parts if len(valid)]
    return [Fold(train[learn], train[valid]) for learn, valid in GroupKFold(count).split(groups, groups=groups)]


def _test_groups(dataset: WindowSet, rule: SplitRule, seed: int) -> tuple[str, ...]:
    names, counts = np.unique(dataset.groups, return_counts=True)
    if rule.test_groups:
        if strangers := sorted(set(rule.test_groups) - set(names.tolist())):
            raise DataError(
                f"[split] test_groups names {strangers}, of which there are no windows; there are "
                f"{_listed(names.tolist())}"
            )
        return tuple(sorted(rule.test_groups))
    limit = TEST_SHARE_MAX * len(dataset)
    if len(names) < 2 or counts.min() > limit:
        raise DataError(
            f"the windows are of {len(names)} groups ({_listed(names.tolist())}), and each has more than "
            f'{TEST_SHARE_MAX:.0%} of them; take more devices, a finer [split] group, or by = "time"'
        )
    best: tuple[tuple[int, float], tuple[str, ...]] | None = None
    draw = np.random.default_rng(seed)
    for _ in range(_DRAWS):
        chosen = _drawn(names, counts, rule.test * len(dataset), limit, draw)
        judged = np.isin(dataset.groups, chosen)
        missing = 0 if dataset.labels is None else _one_sided(dataset.labels, judged)
        verdict = (missing, abs(float(judged.mean()) - rule.test))
        if chosen and (best is None or verdict < best[0]):
            best = verdict, chosen
    assert best is not None  # the smallest group fits
    return best[1]


def _drawn(
    names: npt.NDArray[np.str_], counts: Int64s, wanted: float, limit: float, draw: np.random.Generator
) -> tuple[str, ...]:
    """Groups in a drawn order, as long as they bring the number of windows nearer to what is wanted."""
    chosen: list[str] = []
    held = 0
    for number in draw.permutation(len(names)):
        if len(chosen) >= len(names) - 2:
            break  # two at least must train, or the folds could not go by group
        count = int(counts[number])
        if held + count <= limit and abs(held + count - wanted) < abs(held - wanted):
            chosen.append(str(names[number]))
            held += count
    return tuple(sorted(chosen)) or (str(names[counts.argmin()]),)


def _one_sided(labels: npt.NDArray[np.str_], judged: npt.NDArray[np.bool_]) -> int:
    """How many classes are not on both sides; one that cannot be learned counts a hundredfold."""
    train, test = set(labels[~judged].tolist()), set(labels[judged].tolist())
    return 100 * len(test - train) + len(train - test)


def _check_shares(train: int, test: int, rule: SplitRule) -> None:
    if not train or not test:
        raise DataError(
            f"[split] by = {rule.by!r} leaves {train} windows to train and {test} to judge; take more rows, or another "
            "test share"
        )
    if test > TEST_SHARE_MAX * (train + test):
        raise DataError(
            f"[split] leaves {train} windows to train and {test} to judge, which is less than three quarters to train; "
            "take a smaller test share, or fewer test_groups"
        )


def _at_least_one(folds: list[Fold], remedy: str) -> list[Fold]:
    if not folds:
        raise DataError(f"the training windows are too few for one fold of the cross-validation; {remedy}")
    return folds


def _moment(us: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)).isoformat(timespec="seconds")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED_MAX]) + (f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else "")


def save_split(split: Split, folder: Path) -> None:
    """Write `split.npz`.

    Raises:
        OSError: the disk refused.
    """
    arrays = {
        f"fold_{number}_{side}": getattr(fold, side) for number, fold in enumerate(split.folds) for side in _SIDES
    }
    np.savez(folder / SPLIT_FILE, train=split.train, test=split.test, description=np.array(split.description), **arrays)


def load_split(folder: Path) -> Split:
    """Read what `save_split` wrote.

    Raises:
        DataError: the file is not there, or is not what it should be.
    """
    try:
        with np.load(folder / SPLIT_FILE, allow_pickle=False) as found:
            count = sum(name.endswith("_train") for name in found.files)
            folds = [Fold(*(found[f"fold_{number}_{side}"] for side in _SIDES)) for number in range(count)]
            return Split(found["train"], found["test"], folds, str(found["description"]))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(
            f"{folder / SPLIT_FILE} cannot be read ({error}); make it again: headwater train checks RECIPE"
        ) from error
