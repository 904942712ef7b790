"""Each data check finds what it is for, and says what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from contract.models import Window
from tests.unit.trainer_sets import STEP_US, recipe, window_set, with_labels
from trainer.checks import check_rows
from trainer.findings import Finding, Report, readable, worst
from trainer.leakage import check_split
from trainer.profile import DeviceProfile, FieldProfile, Profile, device_figures, field_profiles
from trainer.progress import NOBODY
from trainer.rows import DeviceRows
from trainer.split import Split, split_windows

GROUPS = {f"g{number}": 40 for number in range(8)}
EVERY_CHECK = (
    *("schema", "size", "missing", "infinite", "ranges", "duplicates", "order", "gaps", "rate", "stuck", "labels"),
    *("dropped", "groups", "leakage", "classes"),
)
RECIPE = recipe(split={"by": "group", "group": "."})
DEVICE = DeviceProfile(
    device="g0",
    group="g0",
    rows=1_000,
    windows=320,
    dropped_mixed=0,
    dropped_unlabelled=0,
    windowed_rows=990,
    duplicates=0,
    backwards=0,
    runs=1,
    step_us=20_000.0,
    first_us=0,
    last_us=20_000_000,
)
FIELD = FieldProfile(
    device="g0",
    field="x",
    nulls=0,
    nans=0,
    infinite=0,
    minimum=-1.0,
    maximum=1.0,
    stuck_rows=0,
    stuck_s=0.0,
)


def profile(field: dict[str, Any] | None = None, *devices: dict[str, Any]) -> Profile:
    changed = [msgspec.structs.replace(DEVICE, **change) for change in devices or ({},)]
    return Profile(devices=changed, fields=[msgspec.structs.replace(FIELD, **(field or {}))])


def finding(check: str, found: list[Finding]) -> Finding:
    return next(one for one in found if one.check == check)


def of_rows(check: str, *, dataset: Any = None, found: Profile | None = None, nan: int = 0, **tables: Any) -> Finding:
    asked = recipe(split={"by": "group", "group": "."}, **tables)
    return finding(check, check_rows(asked, dataset or window_set(GROUPS), found or profile(), nan))


def test_sound_data_passes_every_check() -> None:
    dataset = window_set(GROUPS)
    found = check_rows(RECIPE, dataset, profile(), 0)
    found += check_split(RECIPE, dataset, split_windows(dataset, RECIPE, 1), NOBODY)
    assert {one.check: one.verdict for one in found} == dict.fromkeys(EVERY_CHECK, "ok")


@pytest.mark.parametrize(
    ("check", "change", "verdict", "words"),
    [
        ("missing", {"field": {"nulls": 20}}, "warn", ("2.00%", "x")),
        ("missing", {"field": {"nans": 600}}, "fail", ("60.00%", "[data] fields")),
        ("infinite", {"field": {"infinite": 1}}, "fail", ("x 1", "NULL")),
        ("duplicates", {"device": {"duplicates": 10}}, "warn", ("10 readings", "1.00%")),
        ("duplicates", {"device": {"duplicates": 100}}, "fail", ("10.00%", "QUALIFY")),
        ("order", {"device": {"backwards": 3}}, "warn", ("3 times", "clock")),
        ("gaps", {"device": {"windowed_rows": 400, "runs": 30}}, "fail", ("29 gaps", "60.0%", "gap_s")),
        ("gaps", {"device": {"windowed_rows": 880, "runs": 9}}, "warn", ("8 gaps", "12.0%", "gap_s")),
        ("dropped", {"device": {"dropped_mixed": 30, "dropped_unlabelled": 320}}, "warn", ("30 windows", "320", "52%")),
        ("dropped", {"device": {"dropped_mixed": 300}}, "ok", ("300 windows", "48%")),
        ("stuck", {"field": {"stuck_s": 100.0, "stuck_rows": 100}}, "warn", ("x of g0", "100 s", "10%")),
        ("stuck", {"field": {"stuck_s": 600.0, "stuck_rows": 600}}, "fail", ("60%", "stuck_s")),
    ],
)
def test_what_is_wrong_with_the_rows_is_found(
    check: str, change: dict[str, Any], verdict: str, words: tuple[str, ...]
) -> None:
    found = of_rows(check, found=profile(change.get("field"), change.get("device", {})))
    assert found.verdict == verdict
    said = f"{found.detail} {found.remedy}"
    assert [word for word in words if word not in said] == [], said


def test_one_dead_sensor_among_many_is_named() -> None:
    """Of fifty devices one sends nothing but null: 2 in 100 values of the field are missing, and all of that device."""
    others = [{"device": f"g{number}"} for number in range(50)]
    quiet = recipe(split={"by": "group", "group": "."}, checks={"missing_share_warn": 0.05})
    whole = profile(None, *others)
    dead = msgspec.structs.replace(FIELD, device="g7", nulls=1_000)
    found = finding(
        "missing",
        check_rows(quiet, window_set(GROUPS), Profile(devices=whole.devices, fields=[*whole.fields, dead]), 0),
    )
    assert found.verdict == "warn"
    assert found.figures["dead"] == ["g7/x"]
    assert "2.00% of a field" in found.detail
    assert "more than 50% of x of g7" in found.detail
    assert "device out in [data] sql" in found.remedy


def test_readings_that_a_restored_buffer_sent_again_are_duplicates() -> None:
    """The same moments in two epochs: no reading has the ts of the one before it, and every one is there twice."""
    ts = np.tile(np.arange(10), 2) * STEP_US
    rows = DeviceRows("a", ts, np.ones((20, 1), np.float32), np.array([10]), np.zeros(1, np.int64))
    assert device_figures(rows, RECIPE.window)["duplicates"] == 10


def test_a_device_of_another_rate_is_found() -> None:
    others = [{"device": f"g{number}"} for number in range(4)]
    assert of_rows("rate", found=profile(None, *others, {"device": "odd", "step_us": 15_000.0})).verdict == "warn"
    found = of_rows("rate", found=profile(None, *others, {"device": "odd", "step_us": 1_000.0}))
    assert found.verdict == "fail"
    assert "odd" in found.detail
    assert "50 readings" in found.detail


def test_values_out_of_range_are_counted() -> None:
    dataset = window_set(GROUPS)
    dataset.windows[0, 0, 1] = 99.0
    ranges = {"y": [-10.0, 10.0]}
    assert of_rows("ranges", dataset=dataset, checks={"ranges": ranges}).verdict == "warn"
    dataset.windows[:, 0, 1] = 99.0
    found = of_rows("ranges", dataset=dataset, checks={"ranges": ranges})
    assert found.verdict == "fail"
    assert "25.000% of y is outside -10 .. 10" in found.detail


def test_too_few_windows_fail() -> None:
    assert of_rows("size", checks={"windows_min": 1_000}).verdict == "fail"


def test_labels_that_cannot_be_learned_from_fail() -> None:
    dataset = window_set(GROUPS)
    nan = of_rows("labels", nan=3)
    assert nan.verdict == "fail"
    assert "3 labels are NaN" in nan.detail
    assert "isnan" in nan.remedy
    single = of_rows("labels", dataset=with_labels(dataset, ["a"] * len(dataset)))
    assert single.verdict == "fail"
    assert "label a" in single.detail
    rare = of_rows("labels", dataset=with_labels(dataset, ["rare", *["a", "b"] * 160][: len(dataset)]))
    assert rare.verdict == "warn"
    assert "rare has 1 windows" in rare.detail


def test_anomalies_need_no_labels_and_one_class_only_warns() -> None:
    bare = replace(window_set(GROUPS), labels=None)
    assert of_rows("labels", dataset=bare, task="anomaly", labels=None).verdict == "ok"
    dataset = window_set(GROUPS)
    same = with_labels(dataset, ["normal"] * len(dataset))
    assert of_rows("labels", dataset=same, task="anomaly").verdict == "warn"


def test_the_same_window_on_both_sides_is_a_leak() -> None:
    dataset = window_set(GROUPS)
    split = split_windows(dataset, RECIPE, 1)
    dataset.windows[split.test[:5]] = dataset.windows[split.train[:5]]
    found = finding("leakage", check_split(RECIPE, dataset, split, NOBODY))
    assert found.verdict == "fail"
    assert found.figures == {"identical": 5}
    allowed = recipe(split={"by": "group", "group": "."}, checks={"identical_windows_max": 5})
    assert finding("leakage", check_split(allowed, dataset, split, NOBODY)).verdict == "ok"


def test_a_group_on_both_sides_is_a_leak() -> None:
    dataset = window_set(GROUPS)
    split = split_windows(dataset, RECIPE, 1)
    mixed = Split(split.train[1:], np.append(split.test, split.train[0]), split.folds, "mixed")
    found = finding("groups", check_split(RECIPE, dataset, mixed, NOBODY))
    assert found.verdict == "fail"
    assert found.figures["both"] == [str(dataset.groups[split.train[0]])]


def test_a_class_that_is_judged_but_never_trained_fails() -> None:
    dataset = window_set(GROUPS)
    split = split_windows(dataset, RECIPE, 1)
    labels = dataset.labels.copy()
    labels[split.test[0]] = "c"
    found = finding("classes", check_split(RECIPE, with_labels(dataset, labels.tolist()), split, NOBODY))
    assert found.verdict == "fail"
    assert found.detail.startswith("c is only on the test side")
    labels = dataset.labels.copy()
    labels[split.train[0]] = "c"
    assert (
        finding("classes", check_split(RECIPE, with_labels(dataset, labels.tolist()), split, NOBODY)).verdict == "warn"
    )


def test_figures_of_a_device_are_those_of_its_rows() -> None:
    ts = np.array([0, 1, 1, 2, 200, 201, 100]) * STEP_US
    values = np.array([[1, 5], [1, 5], [1, 5], [2, np.nan], [2, np.inf], [3, 6], [4, -7]], np.float32)
    rows = DeviceRows("a", ts, values, np.array([4]), np.array([0, 1]))
    figures = device_figures(rows, RECIPE.window)
    assert figures == {
        "device": "a",
        "rows": 7,
        "duplicates": 1,
        "backwards": 1,
        "runs": 3,
        "step_us": STEP_US,
        "first_us": 0,
        "last_us": 201 * STEP_US,
    }
    x, y = field_profiles(rows, ("x", "y"), RECIPE.window, 0.01)
    assert (x.stuck_rows, x.stuck_s, x.minimum, x.maximum) == (3, 0.02, 1.0, 4.0)
    assert (y.nulls, y.nans, y.infinite, y.minimum, y.maximum) == (1, 0, 1, -7.0, 6.0)


def test_a_field_is_stuck_in_all_its_long_stretches_but_not_over_a_gap() -> None:
    """A value kept for 3 s, four times; then the same value on both sides of gaps of 100 s, 2 s each time."""
    ts = np.concatenate([np.arange(28), 200 + np.arange(3), 300 + np.arange(3), 400 + np.arange(3)]) * 1_000_000
    x = np.concatenate([np.repeat([1, 2, 1, 2], 4), np.arange(12), np.full(9, 7)]).astype(np.float32)
    rows = DeviceRows("a", ts, x[:, np.newaxis], np.zeros(0, np.int64), np.zeros(1, np.int64))
    (found,) = field_profiles(rows, ("x",), Window(rows=4, stride=2, gap_s=1.0), 2.0)
    assert (found.stuck_rows, found.stuck_s) == (16, 12.0)
    again = DeviceRows("a", ts, x[:, np.newaxis], np.array([2, 6, 10, 14]), np.zeros(1, np.int64))
    (found,) = field_profiles(again, ("x",), Window(rows=4, stride=2, gap_s=1.0), 2.0)
    assert (found.stuck_rows, found.stuck_s) == (0, 0.0)


def test_a_profile_is_read_back_as_it_was(tmp_path: Any) -> None:
    kept = profile({"minimum": None, "maximum": None}, {}, {"device": "b", "step_us": None})
    kept.save(tmp_path)
    assert Profile.load(tmp_path) == kept


def test_a_report_says_verdict_detail_and_remedy() -> None:
    found = [of_rows("size", checks={"windows_min": 1_000}), of_rows("order")]
    text = readable(Report(recipe="r", verdict=worst(found), split="s", findings=found))
    assert "Data checks of r: fail" in text
    assert "fail  size" in text
    assert "→ collect more" in text
    assert worst([]) == "ok"
