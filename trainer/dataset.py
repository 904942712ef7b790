"""The step `dataset`: rows of the lake, at pinned versions, as labelled windows in the work folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lake.columns import DEVICE
from lake.errors import QueryError
from lake.query import Lake, Pins
from lake.raw import table_path
from trainer.errors import DataError, NoSuchStreamError, RecipeError
from trainer.labels import LabelBook, labels_query, read_labels
from trainer.profile import DeviceProfile, FieldProfile, Profile, device_figures, field_profiles
from trainer.recipe import Labels, Recipe, SplitRule
from trainer.rows import DeviceRows, base_query, check_label_field, field_types, read_devices
from trainer.steps import Outputs, StepContext
from trainer.windows import MIXED, UNLABELLED, Int64s, views, window_codes, window_starts
from trainer.windowset import CHUNK_BYTES, WindowMeta, WindowSet, WindowWriter

DEVICES_MAX = 1_000_000
"""Whose groups are held in memory."""
_NAMED_MAX = 5


def pins(context: StepContext) -> dict[str, int]:
    """The version of every table that the recipe reads: the latest, but of the stream that which the recipe names.

    Raises:
        NoSuchStreamError: the stream is not in the lake.
        RecipeError: a question of the recipe cannot be read, or names what is not there; naming its key.
        StoreUnavailableError: the store did not answer.
    """
    recipe, lake = context.recipe, context.lake
    found: dict[str, int] = {}
    for key, query in _queries(recipe).items():
        with _of(key):
            found |= lake.versions(query)
    stream = table_path(recipe.data.stream)
    if stream not in found:
        found |= lake.versions(f'SELECT 1 FROM "{stream}"')
    if stream not in found:
        raise NoSuchStreamError(
            f"there is no stream {recipe.data.stream!r} in {context.store.url}; let a device send it, or mend [data] "
            "stream (see: headwater lake streams)"
        )
    if recipe.data.version is not None:
        found[stream] = recipe.data.version
    return found


def step(context: StepContext) -> Outputs:
    """Cut the windows; writes `windows.npy`, `index.arrow`, `devices.arrow` and `fields.arrow` (see `WindowSet` and
    `Profile`).

    Returns:
        `streams` (versions by name), `sha256`, `windows`, `rows`, `devices`, `classes` (windows by label), `dtypes`,
        `sample_rate_hz`, `labels` (rows of the label table, and those that are NaN), `dropped` windows.

    Raises:
        RecipeError: the recipe does not fit what is in the lake, or the search could not begin.
        DataError: there are no rows, no windows, or too many.
        QueryError, StoreUnavailableError: as `Lake.read`.
        OSError: the disk refused.
    """
    recipe = context.recipe
    _check_search(recipe)
    book = None
    if recipe.labels is not None:
        pinned = context.pins.get(table_path(recipe.labels.stream)) if recipe.labels.stream else None
        if pinned is not None:
            check_label_field(context.store, recipe.labels, pinned)
        with _of(_label_key(recipe.labels)):
            answer = context.lake.sql(labels_query(recipe.labels, recipe.data.stream), at=context.pins)
        book = read_labels(answer, recipe.labels)
    group_of = groups(context.lake, recipe.split, context.pins)
    dtypes = field_types(context.store, recipe.data, context.pins[table_path(recipe.data.stream)])
    cutter = Cutter(recipe, book, group_of)
    total = _count(context)
    if not total:
        raise DataError(
            f"there are no rows of {recipe.data.stream} at {_shown(context.pins)}; wait for readings, or mend [data] "
            "sql and version"
        )
    with (
        WindowWriter(context.into, recipe.window.rows, len(recipe.data.fields)) as writer,
        context.progress.track("cutting windows", total) as advance,
    ):
        for rows in read_devices(context.lake, recipe.data, context.pins):
            cutter.cut(rows, writer)
            advance(len(rows.ts_us))
    dataset, profile = cutter.finish(context.into, dtypes, _by_name(context.pins))
    dataset.save_index(context.into)
    profile.save(context.into)
    return _outputs(dataset, profile, book)


def _check_search(recipe: Recipe) -> None:
    """Refuse at once what the search would refuse after all windows are cut.

    Raises:
        ConfigurationError: a metric, family or parameter is unknown, or not installed.
    """
    from trainer.candidates import find_scorer  # scikit-learn costs more than a second
    from trainer.families import spaces_of

    find_scorer(recipe.search.metric)
    spaces_of(recipe.task, recipe.families)


def groups(lake: Lake, rule: SplitRule, pinned: Pins) -> Callable[[str], str]:
    """Who must not be on both sides: the function from a device to its group.

    Raises:
        RecipeError: `group_sql` cannot be answered, or lacks a column.
        DataError: it gives one device several groups; later, of the function: it gives a device none.
    """
    if rule.group_sql:
        with _of("[split] group_sql"):
            answer = lake.sql(rule.group_sql, at=pinned)
        if not {DEVICE, "group"} <= set(answer.column_names):
            raise RecipeError(f"[split] group_sql gives {answer.column_names}; it must give _device and group")
        known: dict[str, Any] = {}
        for row in answer.select([DEVICE, "group"]).to_pylist():
            device, group = str(row[DEVICE]), row["group"]
            if known.setdefault(device, group) != group:
                raise DataError(
                    f"[split] group_sql gives device {device!r} the groups {known[device]!r} and {group!r}; which of "
                    "them must not be on both sides? Give each device one"
                )
        return lambda device: _named(known.get(device), device, "[split] group_sql gives no group")
    if rule.group:
        pattern = re.compile(rule.group)

        def by_name(device: str) -> str:
            found = pattern.search(device)
            text = None if found is None else found[1] if pattern.groups else found[0]
            return _named(text, device, f"[split] group = {rule.group!r} does not match")

        return by_name
    return lambda device: device


def _named(group: Any, device: str, trouble: str) -> str:
    if group is None or not str(group):
        raise DataError(f"{trouble} for device {device!r}; mend it, or leave that device out in [data] sql")
    return str(group)


class Cutter:
    """Cuts one device after the other, and remembers what is known of each window."""

    def __init__(self, recipe: Recipe, book: LabelBook | None, group_of: Callable[[str], str]) -> None:
        self._recipe, self._book, self._group_of = recipe, book, group_of
        self._span = recipe.labels.span if recipe.labels is not None else "last"
        self._bytes = recipe.window.rows * len(recipe.data.fields) * 4
        self._codes: list[np.ndarray[Any, np.dtype[np.int32]]] = []
        self._starts_us: list[Int64s] = []
        self._ends_us: list[Int64s] = []
        self._devices: list[DeviceProfile] = []
        self._fields: list[FieldProfile] = []

    def cut(self, rows: DeviceRows, writer: WindowWriter) -> None:
        """Write the windows of a device.

        Raises:
            DataError: the dataset grows beyond its bound, or the device has no group.
            OSError: the disk refused.
        """
        window = self._recipe.window
        starts = window_starts(rows.ts_us, window, rows.epochs)
        everything = len(starts)
        # Which rows stand in a window: neighbours overlap, or leave a gap of stride - rows.
        windowed = (
            int(np.minimum(np.diff(starts, append=starts[-1] + window.rows), window.rows).sum()) if everything else 0
        )
        codes = np.full(everything, UNLABELLED, np.int32)
        if self._book is not None:
            codes = window_codes(self._book.at(rows.device, rows.ts_us), starts, window.rows, self._span)
        dropped = codes == MIXED
        unlabelled = (codes == UNLABELLED) & (self._recipe.task == "classification")
        keep = ~(dropped | unlabelled)
        starts, codes = starts[keep], codes[keep]
        self._check_size(writer.count + len(starts), rows.device)
        if len(starts):
            every = views(rows.values, window.rows)
            size = max(1, CHUNK_BYTES // self._bytes)
            for begin in range(0, len(starts), size):
                writer.append(every[starts[begin : begin + size]])
        self._codes.append(codes)
        self._starts_us.append(rows.ts_us[starts])
        self._ends_us.append(rows.ts_us[starts + window.rows - 1])
        self._devices.append(
            DeviceProfile(
                **device_figures(rows, window),
                group=self._group_of(rows.device),
                windows=len(starts),
                dropped_mixed=int(dropped.sum()),
                dropped_unlabelled=int(unlabelled.sum()),
                windowed_rows=windowed,
            )
        )
        if len(self._devices) > DEVICES_MAX:
            raise DataError(f"there are more than {DEVICES_MAX} devices; take fewer with a WHERE in [data] sql")
        self._fields += field_profiles(rows, self._recipe.data.fields, window, self._recipe.checks.stuck_s)

    def finish(self, folder: Path, dtypes: tuple[str, ...], streams: Mapping[str, int]) -> tuple[WindowSet, Profile]:
        """All that was cut; its windows are those in the folder.

        Raises:
            DataError: there is no window.
        """
        profile = Profile(devices=self._devices, fields=self._fields)
        counts = [device.windows for device in profile.devices]
        if not sum(counts):
            raise DataError(self._nothing(profile))
        steps = [device.step_us for device in profile.devices if device.step_us]
        codes = np.concatenate(self._codes)
        names = np.array([*(self._book.classes if self._book is not None else ()), ""])
        labels = None if self._book is None else names[codes]  # UNLABELLED is the last, ""
        classes = () if labels is None else tuple(sorted({str(name) for name in np.unique(labels)} - {""}))
        meta = WindowMeta(
            fields=self._recipe.data.fields,
            dtypes=dtypes,
            classes=classes,
            sample_rate_hz=1e6 / float(np.median(steps)) if steps else None,
            streams=streams,
        )
        shape = (sum(counts), self._recipe.window.rows, len(self._recipe.data.fields))
        dataset = WindowSet(
            np.load(folder / "windows.npy", mmap_mode="r").reshape(shape),
            labels,
            np.repeat([device.group for device in profile.devices], counts),
            np.repeat([device.device for device in profile.devices], counts),
            np.concatenate(self._starts_us),
            np.concatenate(self._ends_us),
            meta,
        )
        return dataset, profile

    def _check_size(self, windows: int, device: str) -> None:
        limit = self._recipe.data.dataset_bytes_max
        if windows * self._bytes > limit:
            raise DataError(
                f"with device {device} the windows take more than {limit} bytes ({windows} of {self._bytes} bytes); "
                "take a longer [window] stride, fewer fields or rows, or raise [data] dataset_bytes_max"
            )

    def _nothing(self, profile: Profile) -> str:
        rows, mixed, bare = (
            sum(getattr(device, name) for device in profile.devices)
            for name in ("rows", "dropped_mixed", "dropped_unlabelled")
        )
        window = self._recipe.window
        if mixed or bare:
            named = ", ".join(device.device for device in profile.devices[:_NAMED_MAX])
            return (
                f"no window has one label: {mixed} are over several, {bare} have rows without any; do [labels] name "
                f'the devices ({named}) and the time of the rows? Else take shorter windows, or span = "majority"'
            )
        return (
            f"{rows} rows of {len(profile.devices)} devices give no window: none has {window.rows} readings at most "
            f"{window.gap_s:g} s apart; take fewer [window] rows or a longer gap_s"
        )


def _queries(recipe: Recipe) -> dict[str, str]:
    """What is asked of the lake, by the key of the recipe that says so."""
    data, labels, split = recipe.data, recipe.labels, recipe.split
    queries = {"[data] sql" if data.sql else "[data] stream": base_query(data)}
    if labels is not None:
        queries[_label_key(labels)] = labels_query(labels, data.stream)
    if split.group_sql:
        queries["[split] group_sql"] = split.group_sql
    return queries


def _label_key(labels: Labels) -> str:
    return f"[labels] {'sql' if labels.sql else 'stream' if labels.stream else 'table'}"


@contextmanager
def _of(key: str) -> Iterator[None]:
    """A question that cannot be answered is one of a key of the recipe."""
    try:
        yield
    except QueryError as error:
        raise RecipeError(f"{key}: {error}") from error


def _count(context: StepContext) -> int:
    answer = context.lake.sql(f"SELECT count(*) FROM ({base_query(context.recipe.data)})", at=context.pins)
    return int(answer.column(0)[0].as_py())


def _by_name(pinned: Pins) -> dict[str, int]:
    return {path.removeprefix("raw/"): version for path, version in sorted(pinned.items())}


def _shown(pinned: Pins) -> str:
    return ", ".join(f"{name} version {version}" for name, version in _by_name(pinned).items())


def _outputs(dataset: WindowSet, profile: Profile, book: LabelBook | None) -> Outputs:
    labels = pa.array([] if dataset.labels is None else dataset.labels.tolist(), pa.string()).value_counts().to_pylist()
    return {
        "streams": dict(dataset.meta.streams),
        "sha256": dataset.sha256(),
        "windows": len(dataset),
        "rows": sum(device.rows for device in profile.devices),
        "devices": len(profile.devices),
        "groups": len({device.group for device in profile.devices}),
        "classes": {one["values"]: one["counts"] for one in sorted(labels, key=lambda one: str(one["values"]))},
        "dtypes": list(dataset.meta.dtypes),
        "sample_rate_hz": dataset.meta.sample_rate_hz,
        "labels": None if book is None else {"rows": book.rows, "nan_rows": book.nan_rows},
        "dropped": {
            "mixed": sum(device.dropped_mixed for device in profile.devices),
            "unlabelled": sum(device.dropped_unlabelled for device in profile.devices),
        },
    }


__all__ = ["Cutter", "WindowSet", "groups", "pins", "step"]
