"""The step `checks`: may a model learn from this dataset? Also divides it, because what leaks depends on the split.

Each check is a function of figures to one `Finding`; thresholds are in the recipe's `[checks]`. A finding that fails
stops the step with a report; what warns is reported and does not stop.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

from trainer.errors import ChecksFailedError
from trainer.findings import NAMED_MAX, Finding, Report, Verdict, counted, ok, readable, worst
from trainer.leakage import check_split
from trainer.profile import FieldProfile, Profile
from trainer.recipe import Recipe, Thresholds
from trainer.split import save_split, split_windows
from trainer.steps import REPORT, Outputs, StepContext
from trainer.windowset import WindowSet

READABLE = "report.txt"


def step(context: StepContext) -> Outputs:
    """Divide and check; writes `split.npz`, `report.json` and `report.txt`.

    Returns:
        `verdict`, `split` (its description), `train`, `test`, `folds` (windows of each), `findings`.

    Raises:
        ChecksFailedError: at least one check failed; the report is kept in `checks.failed`.
        DataError: the windows cannot be divided by the recipe's rule.
        OSError: the disk refused.
    """
    recipe = context.recipe
    dataset, profile = context.windows(), Profile.load(context.folder("dataset"))
    labels = context.outputs("dataset")["labels"]
    # Labels that cannot be learned from would make the split fail first, with less to say about it.
    findings = check_rows(recipe, dataset, profile, 0 if labels is None else labels["nan_rows"])
    if worst(findings) == "fail":
        _stop(context, findings, "not divided")
    split = split_windows(dataset, recipe, context.seed)
    findings += check_split(recipe, dataset, split, context.progress)
    if worst(findings) == "fail":
        _stop(context, findings, split.description)
    save_split(split, context.into)
    report = _write(context, findings, split.description)
    return {
        "verdict": report.verdict,
        "split": split.description,
        "train": len(split.train),
        "test": len(split.test),
        "folds": [[len(fold.train), len(fold.valid)] for fold in split.folds],
        "findings": findings,
    }


def check_rows(recipe: Recipe, dataset: WindowSet, profile: Profile, nan_labels: int) -> list[Finding]:
    """What can be said before the split.

    Args:
        recipe: with the thresholds.
        dataset: at least one window.
        profile: of the rows it was cut from.
        nan_labels: rows of the label table whose label is NaN or empty.
    """
    limits = recipe.checks
    return [
        _schema(dataset),
        _size(limits, dataset),
        _missing(limits, profile),
        _infinite(profile),
        _ranges(limits, dataset),
        _duplicates(limits, profile),
        _order(profile),
        _gaps(limits, recipe, profile),
        _rate(limits, profile),
        _stuck(limits, profile),
        _labels(recipe, dataset, nan_labels),
        _dropped(limits, profile),
    ]


def _stop(context: StepContext, findings: list[Finding], split: str) -> None:
    _write(context, findings, split)
    failed = [f"{one.check}: {one.detail} ({one.remedy})" for one in findings if one.verdict == "fail"]
    raise ChecksFailedError(
        f"{len(failed)} data checks of {context.recipe.name} failed: {'; '.join(failed)}. The whole report is in "
        f"{context.work / 'checks.failed' / READABLE}"
    )


def _write(context: StepContext, findings: list[Finding], split: str) -> Report:
    report = Report(recipe=context.recipe.name, verdict=worst(findings), split=split, findings=findings)
    (context.into / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    (context.into / READABLE).write_text(readable(report), encoding="utf-8")
    return report


def _schema(dataset: WindowSet) -> Finding:
    fields = [f"{name} {kind}" for name, kind in zip(dataset.fields, dataset.meta.dtypes, strict=True)]
    return ok("schema", ", ".join(fields), fields=list(dataset.fields), dtypes=list(dataset.meta.dtypes))


def _size(limits: Thresholds, dataset: WindowSet) -> Finding:
    detail = f"{len(dataset)} windows of {len(np.unique(dataset.devices))} devices"
    if len(dataset) >= limits.windows_min:
        return ok("size", detail, windows=len(dataset))
    return Finding(
        check="size",
        verdict="fail",
        detail=f"{detail}, fewer than {limits.windows_min}",
        figures={"windows": len(dataset)},
        remedy="collect more, take a shorter [window] stride, or lower [checks] windows_min",
    )


def _missing(limits: Thresholds, profile: Profile) -> Finding:
    rows = {device.device: device.rows for device in profile.devices}
    shares = {
        name: sum(one.nulls + one.nans for one in of_field) / sum(rows.values())
        for name, of_field in _by_field(profile.fields)
    }
    name, share = max(shares.items(), key=lambda item: item[1])
    # One sensor of many that is dead is little of the whole, and everything to those who look at its device.
    dead = [one for one in profile.fields if one.nulls + one.nans > limits.missing_share_fail * rows[one.device]]
    verdict: Verdict = "warn" if dead or share > limits.missing_share_warn else "ok"
    if share > limits.missing_share_fail:
        verdict = "fail"
    detail = f"at most {share:.2%} of a field is null or NaN ({name})" if share else "no value is missing"
    if dead:
        named = ", ".join(f"{one.field} of {one.device}" for one in dead[:NAMED_MAX])
        more = f" and {len(dead) - NAMED_MAX} more" if len(dead) > NAMED_MAX else ""
        detail += f"; more than {limits.missing_share_fail:.0%} of {named}{more}"
    return Finding(
        check="missing",
        verdict=verdict,
        detail=detail,
        figures={"share": shares, "dead": [f"{one.device}/{one.field}" for one in dead[:100]]},
        remedy=""
        if verdict == "ok"
        else "mend the sensor, leave the field out of [data] fields or the device out in [data] sql, or fill it there",
    )


def _infinite(profile: Profile) -> Finding:
    found = {name: count for name, of in _by_field(profile.fields) if (count := sum(one.infinite for one in of))}
    if not found:
        return ok("infinite", "no value is infinite or beyond float32")
    return Finding(
        check="infinite",
        verdict="fail",
        detail=f"infinite, or beyond float32: {counted(found)}",
        figures={"values": found},
        remedy="windows hold float32; scale the field, or set such values to NULL in [data] sql",
    )


def _ranges(limits: Thresholds, dataset: WindowSet) -> Finding:
    if not limits.ranges:
        return ok("ranges", "no ranges were given")
    outside = dict.fromkeys(limits.ranges, 0)
    for piece in dataset.chunks():
        windows = dataset.windows[piece]
        for name, (low, high) in limits.ranges.items():
            values = windows[:, :, dataset.fields.index(name)]
            outside[name] += int(((values < low) | (values > high)).sum())
    total = dataset.windows.shape[0] * dataset.windows.shape[1]
    name, most = max(outside.items(), key=lambda item: item[1])
    share = most / total
    verdict: Verdict = "ok" if not most else "fail" if share > limits.out_of_range_share_fail else "warn"
    low, high = limits.ranges[name]
    return Finding(
        check="ranges",
        verdict=verdict,
        detail=f"{share:.3%} of {name} is outside {low:g} .. {high:g}"
        if most
        else "all values are within their ranges",
        figures={"outside": outside, "values": total},
        remedy=""
        if verdict == "ok"
        else f"look at {name} there; leave such rows out in [data] sql, or widen its range",
    )


def _duplicates(limits: Thresholds, profile: Profile) -> Finding:
    device = max(profile.devices, key=lambda one: one.duplicates / one.rows)
    total = sum(one.duplicates for one in profile.devices)
    if not total:
        return ok("duplicates", "no device has two readings of one moment")
    share = device.duplicates / device.rows
    return Finding(
        check="duplicates",
        verdict="fail" if share > limits.duplicate_share_fail else "warn",
        detail=f"{total} readings have a ts that their device had before; most has {device.device}, {share:.2%}",
        figures={"rows": total, "share_most": share, "device_most": device.device},
        remedy="is the sensor polled faster than it measures, or was its buffer restored? Keep one of each in [data] "
        "sql with QUALIFY row_number()",
    )


def _order(profile: Profile) -> Finding:
    found = {one.device: one.backwards for one in profile.devices if one.backwards}
    if not found:
        return ok("order", "ts never goes back")
    return Finding(
        check="order",
        verdict="warn",
        detail=f"ts goes back {sum(found.values())} times, on {counted(found)}",
        figures={"times": found},
        remedy="a clock was set; no window goes over such a place. Does the device wait for its clock?",
    )


def _gaps(limits: Thresholds, recipe: Recipe, profile: Profile) -> Finding:
    rows = sum(one.rows for one in profile.devices)
    outside = rows - sum(one.windowed_rows for one in profile.devices)
    gaps = sum(one.runs - 1 - one.backwards for one in profile.devices)
    # With a stride beyond the window's length, rows in between are left out on purpose.
    meant = max(0.0, 1 - recipe.window.rows / recipe.window.stride)
    share = outside / rows
    verdict: Verdict = "warn" if share > limits.unwindowed_share_warn + meant else "ok"
    if share > limits.unwindowed_share_fail + meant:
        verdict = "fail"
    return Finding(
        check="gaps",
        verdict=verdict,
        detail=f"{gaps} gaps longer than {recipe.window.gap_s:g} s; {share:.1%} of the rows stand in no window",
        figures={"gaps": gaps, "rows_outside": outside, "share_outside": share},
        remedy=""
        if verdict == "ok"
        else "take fewer [window] rows or a longer gap_s, and see why readings are missing (SQL: FROM gaps)",
    )


def _rate(limits: Thresholds, profile: Profile) -> Finding:
    rates = {one.device: 1e6 / one.step_us for one in profile.devices if one.step_us}
    if not rates:
        return ok("rate", "no device has two readings")
    usual = float(np.median(list(rates.values())))
    device, rate = max(rates.items(), key=lambda item: abs(item[1] / usual - 1))
    off = abs(rate / usual - 1)
    verdict: Verdict = "ok"
    if off > limits.rate_tolerance:
        verdict = "fail" if off > 2 * limits.rate_tolerance else "warn"
    return Finding(
        check="rate",
        verdict=verdict,
        detail=f"usually {usual:.6g} readings a second; {device} is {off:.1%} off",
        figures={"usual_hz": usual, "off_most": off, "device_most": device},
        remedy=""
        if verdict == "ok"
        else f"a window of {device} lasts another time than the others'; give all devices one rate, or leave it out",
    )


def _stuck(limits: Thresholds, profile: Profile) -> Finding:
    rows = {one.device: one.rows for one in profile.devices}
    stuck = [one for one in profile.fields if one.stuck_rows]
    if not stuck:
        return ok("stuck", f"no field keeps one value for more than {limits.stuck_s:g} s")
    most = max(stuck, key=lambda one: one.stuck_rows / rows[one.device])
    share = most.stuck_rows / rows[most.device]
    return Finding(
        check="stuck",
        verdict="fail" if share > limits.stuck_share_fail else "warn",
        detail=f"{len(stuck)} fields keep one value for more than {limits.stuck_s:g} s; {most.field} of {most.device} "
        f"for {most.stuck_s:.0f} s in all, {share:.0%} of its readings",
        figures={"fields": [f"{one.device}/{one.field}" for one in stuck[:100]], "share_most": share},
        remedy="look at that sensor; leave the device or the field out, or raise [checks] stuck_s where this is normal",
    )


def _labels(recipe: Recipe, dataset: WindowSet, nan_labels: int) -> Finding:
    if dataset.labels is None:
        return ok("labels", "there are none, and none are needed")
    counts = dict(zip(*(part.tolist() for part in np.unique(dataset.labels, return_counts=True)), strict=True))
    counts.pop("", None)
    figures = {"windows": counts, "nan_rows": nan_labels}
    problem = _label_problem(recipe, counts, nan_labels)
    if problem is None:
        return ok("labels", f"{len(counts)} classes: {counted(counts)}", **figures)
    verdict, detail, remedy = problem
    return Finding(check="labels", verdict=verdict, detail=detail, figures=figures, remedy=remedy)


def _label_problem(recipe: Recipe, counts: dict[str, int], nan_labels: int) -> tuple[Verdict, str, str] | None:
    """Verdict, detail and remedy; None where all is well."""
    learns = recipe.task == "classification"
    if nan_labels:
        remedy = "leave such rows out: give [labels] sql with WHERE label IS NOT NULL AND NOT isnan(label)"
        return "fail", f"{nan_labels} labels are NaN or empty", remedy
    if len(counts) < 2:
        detail = f"all windows have the label {next(iter(counts), 'none')}: there is nothing to tell apart"
        if learns:
            return "fail", detail, "collect readings of another class, or mend [labels]; without labels use anomaly"
        return "warn", detail, "the model cannot be judged by labels; mend [labels], or leave it out"
    name, fewest = min(counts.items(), key=lambda item: item[1])
    limits = recipe.checks
    if learns and (fewest < limits.class_windows_min or fewest / sum(counts.values()) < limits.class_share_min):
        detail = f"the class {name} has {fewest} windows, {fewest / sum(counts.values()):.2%} of all"
        return "warn", detail, f"collect more of {name}, or leave it out; its figures will say little"
    return None


def _dropped(limits: Thresholds, profile: Profile) -> Finding:
    mixed, bare, kept = (
        sum(getattr(one, name) for one in profile.devices)
        for name in ("dropped_mixed", "dropped_unlabelled", "windows")
    )
    share = (mixed + bare) / max(1, mixed + bare + kept)
    detail = f"{mixed} windows over several labels and {bare} with rows without any were left out, {share:.0%} of all"
    verdict: Verdict = "warn" if share > limits.dropped_share_warn else "ok"
    return Finding(
        check="dropped",
        verdict=verdict,
        detail=detail if mixed + bare else "no window was left out for its labels",
        figures={"mixed": mixed, "unlabelled": bare, "share": share},
        remedy=""
        if verdict == "ok"
        else 'do [labels] name all devices and times? Else take shorter windows, span = "majority", or otherwise',
    )


def _by_field(fields: Iterable[FieldProfile]) -> list[tuple[str, list[FieldProfile]]]:
    found: dict[str, list[FieldProfile]] = {}
    for one in fields:
        found.setdefault(one.field, []).append(one)
    return list(found.items())
