"""`recipe.toml`: everything that decides which model comes out, in one file that is kept with the release.

Read once at the rim by `load_recipe`; an unknown key, a wrong type or a value that cannot be ends the start with a
message that names file, key, value and remedy.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from contract.errors import ConfigurationError
from contract.models import WINDOW_CELLS_MAX, Cost, Trial, Window
from contract.names import is_name
from contract.settings import convert, read_toml
from lake import rollout_spec
from lake.monitoring import policy
from trainer.errors import RecipeError

Task = Literal["classification", "anomaly"]
Scalar = bool | int | float | str
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]

TEST_SHARE_MAX = 0.25
"""At least three quarters of the windows are for training."""
DATASET_BYTES_MAX = 4 * 1024 * 1024 * 1024
FIELDS_MAX = 4_096

FAMILIES: dict[Task, tuple[str, ...]] = {
    "classification": (
        "logistic_regression",
        "random_forest",
        "extra_trees",
        "hist_gradient_boosting",
        "mlp",
        "lightgbm",
        "xgboost",
    ),
    "anomaly": ("isolation_forest", "one_class_svm", "robust_z_score"),
}
"""Names of model families, by task (see `trainer.families`)."""


STATISTICS = ("mean", "std", "min", "max", "rms", "slope", "skew", "kurtosis", "crest", "ptp", "zero_crossings")
"""The features of a channel besides its bands (see `trainer.graph`)."""
BANDS = "bands"
"""Stands for one feature per band."""
FEATURES = (*STATISTICS, BANDS)


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the recipe."""


class Range(Part, frozen=True, kw_only=True):
    """Where the search may look for a number; whole numbers where `low` and `high` are whole."""

    low: int | float
    high: int | float
    log: bool = False
    """Whether the search draws evenly over orders of magnitude."""
    step: int | float | None = None
    """Only `low`, `low + step` and so on; not with `log`."""

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)


Space = Range | list[Scalar] | Scalar
"""What a parameter may be: a range, one of a list, or fixed."""


class Data(Part, frozen=True, kw_only=True):
    """Which rows."""

    stream: str
    """The stream that devices will run the model over."""
    fields: tuple[str, ...]
    """Channels of the window, in their order: numbers or truth values. Null becomes NaN."""
    sql: str = ""
    """A SELECT that gives `_device`, `ts` and the fields, and `_epoch, _seq, _row` if the order in which the device
    recorded is to be kept (without them rows are taken by `ts`, those of one moment by their values). Empty: all rows
    of the stream."""
    version: int | None = None
    """Delta version of the stream to train on; None: the latest when the dataset is made."""
    memory_bytes_max: Annotated[int, msgspec.Meta(ge=64 << 20)] = 1 << 30
    """What DuckDB may use; beyond it, it sorts on disk, in the work folder."""
    device_rows_max: Count = 50_000_000
    """Rows of one device, which are held in memory at once: of each some 50 bytes, and of each value 4 beside those of
    its own type."""
    dataset_bytes_max: Count = DATASET_BYTES_MAX
    """Size of all windows, `windows x rows x fields x 4`."""


class Labels(Part, frozen=True, kw_only=True):
    """What was true at each row: exactly one of `stream`, `table` and `sql`."""

    stream: str = ""
    """A stream of changes: a label holds from its `ts` until the next row of the same device."""
    field: str = "label"
    """The column of `stream` that holds the label."""
    table: str = ""
    """A table of intervals: `control/labels`."""
    sql: str = ""
    """A SELECT that gives `_device, ts, label` (changes) or `_device, start, end, label` (intervals without their
    `end`). Of two that begin at one moment the later row counts: write ORDER BY where that may happen."""
    span: Literal["drop", "majority", "last"] = "drop"
    """A window over more than one label is dropped, or has the label of most of its rows (of equals the later), or
    that of its last row."""
    otherwise: str = ""
    """The label of rows that have none; empty: windows with such rows are dropped (classification) or have no label."""


class SplitRule(Part, frozen=True, kw_only=True):
    """Which windows train and which judge."""

    by: Literal["device", "group", "time", "random"] = "device"
    group: str = ""
    """Regular expression over the device's name; its first group (or the whole match) is the window's group, such as
    the person who wore it. No group is on both sides."""
    group_sql: str = ""
    """Instead: a SELECT that gives `_device, group`."""
    test: Annotated[float, msgspec.Meta(gt=0, le=TEST_SHARE_MAX)] = 0.2
    test_groups: tuple[str, ...] = ()
    """Exactly these groups judge, instead of drawn ones; with `by = "device"` or `"group"`."""
    folds: Annotated[int, msgspec.Meta(ge=2, le=20)] = 5
    """Of the cross-validation within the training windows."""
    force: bool = False
    """Allows `by = "random"` over windows that overlap: the figures will be too good."""


class Features(Part, frozen=True, kw_only=True):
    """What is computed of each channel of a window."""

    include: tuple[str, ...] = ()
    """Of `FEATURES` (see `trainer.graph`); none: all."""
    bands: tuple[tuple[float, float], ...] = ()
    """Edges of the DFT bands in Hz; none: octaves down from the Nyquist frequency."""
    select: Literal["none", "variance", "importance"] = "importance"
    """How features that do not help are left out."""
    count_max: Count | None = None
    """Keep at most this many."""


class Search(Part, frozen=True, kw_only=True):
    """What counts as good, and how long to look for it."""

    metric: str
    """A scorer's name of scikit-learn, such as `f1_macro`; higher is better."""
    target: float | None = None
    """Stop when the cross-validated metric is at least this."""
    trials: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 40
    seconds: Annotated[float, msgspec.Meta(gt=0, le=7 * 86_400.0)] = 600.0
    trial_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400.0)] = 120.0
    """One trial's fold; a trial that takes longer is given up."""
    contamination: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] = 0.01
    """Anomaly: the share of training windows that the threshold leaves above it."""
    class_weights: bool = True
    """Classification: a rare class counts as much as a common one, in the families that can."""


class Report(Part, frozen=True, kw_only=True):
    """What the evaluation adds to its figures; each costs time."""

    html: bool = True
    """One page with figures and plots."""
    learning_curve: bool = True
    """Train the chosen model on a quarter, a half and three quarters of the groups, too."""


class Thresholds(Part, frozen=True, kw_only=True):
    """When a data check warns, and when it fails."""

    windows_min: Count = 100
    class_windows_min: Count = 20
    """Of each class; below it a warning."""
    class_share_min: Share = 0.01
    missing_share_warn: Share = 0.01
    missing_share_fail: Share = 0.5
    """Of the values of one field."""
    duplicate_share_fail: Share = 0.05
    """Rows of a device with the `ts` of its row before."""
    stuck_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """A field that keeps one value for longer than this on some device is stuck: a warning."""
    stuck_share_fail: Share = 0.5
    """Part of a device's rows within such stretches."""
    unwindowed_share_fail: Share = 0.5
    """Part of the rows that stand in no window, for gaps or for labels."""
    rate_tolerance: Share = 0.2
    """How far a device's usual rate may be from that of all, before a warning; twice as far fails."""
    ranges: dict[str, tuple[float, float]] = {}
    """By field: what is physically possible, the lowest and the highest."""
    out_of_range_share_fail: Share = 0.001
    identical_windows_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Windows that are, to the bit, on both sides of the split."""


class Retrain(policy.Retrain, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to learn again. Gateways read it out of the manifest."""


class Policy(Part, frozen=True, kw_only=True):
    """What may happen without a person."""

    approve: bool = False
    """Sign the release, where the keys are at hand and held-out windows meet `[search] target`, which it needs."""
    rollout: bool = False
    """`train watch` starts the rollout of a release that it approved; `train run` leaves that to a person."""
    retrain: Retrain = Retrain()


class Stage(Part, frozen=True, kw_only=True):
    """One step of a rollout: exactly one of `percent`, `tag` and `devices`."""

    percent: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    tag: str = ""
    devices: tuple[str, ...] = ()
    bake_s: Annotated[float, msgspec.Meta(ge=0)] = 3_600.0
    approval: bool = False
    """Whether somebody must let this stage begin."""


class Rollout(Part, frozen=True, kw_only=True):
    """How a release of this recipe is rolled out."""

    stages: tuple[Stage, ...] = (
        Stage(percent=5.0),
        Stage(percent=25.0),
        Stage(percent=100.0, bake_s=0.0),
    )
    max_wait_s: Annotated[float, msgspec.Meta(gt=0)] = 86_400.0
    """Devices that are not seen for so long are excused."""
    guard: dict[str, float] = {}
    """Limits that abort it (see `lake.rollout_spec.Guard`)."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole recipe."""

    name: str
    """Of the model, and of the folder in which the steps work."""
    task: Task
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 1
    data: Data
    labels: Labels | None = None
    window: Window
    split: SplitRule = SplitRule()
    features: Features = Features()
    families: dict[str, dict[str, Space]] = {}
    """Search space of each family by parameter; none: all families of the task that need no extra, with their own."""
    search: Search
    report: Report = Report()
    checks: Thresholds = Thresholds()
    limits: Cost = Cost()
    """What the model may cost on a device."""
    trial: Trial = Trial()
    """How long a device tries it."""
    policy: Policy = Policy()
    rollout: Rollout = Rollout()


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigurationError: naming file, key, value and remedy.
    """
    return parse_recipe(read_toml(path, "a recipe.toml"), str(path))


def parse_recipe(table: dict[str, Any], source: str) -> Recipe:
    """Check a parsed recipe.

    Args:
        table: the parsed TOML.
        source: its name, for messages.

    Raises:
        ConfigurationError: naming key, value and remedy.
    """
    _check_spaces(table, source)
    recipe = convert(table, Recipe, f"{source}: ")
    try:
        _check(recipe)
    except ConfigurationError as error:
        raise RecipeError(f"{source}: {error}") from error
    return recipe


def _check_spaces(table: dict[str, Any], source: str) -> None:
    """Ranges one by one: in a table of tables whose keys are free, a message could not say which one is wrong."""
    families = table.get("families")
    for family, spaces in (families if isinstance(families, dict) else {}).items():
        for name, space in (spaces if isinstance(spaces, dict) else {}).items():
            if isinstance(space, dict):
                convert(space, Range, f"{source}: [families.{family}.{name}] ")


def _check(recipe: Recipe) -> None:
    for key, name in (("name", recipe.name), ("[data] stream", recipe.data.stream)):
        if not is_name(name):
            raise RecipeError(f"{key} = {name[:80]!r} is not a name; use 1 to 63 of a-z 0-9 . _ -")
    _check_data(recipe)
    _check_labels(recipe)
    _check_split(recipe)
    _check_features(recipe)
    _check_families(recipe)
    _check_ranges(recipe)
    _check_rollout(recipe)
    if recipe.policy.approve and recipe.search.target is None:
        raise RecipeError(
            "[policy] approve = true needs [search] target, which held-out windows must meet: without one anything "
            "would be signed; give a target, or let a person approve"
        )


def _check_data(recipe: Recipe) -> None:
    fields = recipe.data.fields
    if not fields or len(fields) > FIELDS_MAX:
        raise RecipeError(f"[data] fields has {len(fields)} names; give 1 to {FIELDS_MAX}")
    if repeated := {name for name in fields if fields.count(name) > 1}:
        raise RecipeError(f"[data] fields names {sorted(repeated)} more than once; name every channel once")
    if recipe.window.rows * len(fields) > WINDOW_CELLS_MAX:
        raise RecipeError(
            f"[window] rows = {recipe.window.rows} with {len(fields)} fields has more than {WINDOW_CELLS_MAX} cells; "
            "take fewer rows or fields"
        )


def _check_labels(recipe: Recipe) -> None:
    labels = recipe.labels
    if labels is None:
        if recipe.task == "classification":
            raise RecipeError("[labels] is missing; a classification learns from labels: give stream, table or sql")
        return
    if bool(labels.stream) + bool(labels.table) + bool(labels.sql) != 1:
        raise RecipeError("[labels] has none or several of stream, table and sql; give exactly one")


def _check_split(recipe: Recipe) -> None:
    rule = recipe.split
    if rule.group and rule.group_sql:
        raise RecipeError("[split] has both group and group_sql; give one")
    if rule.by == "group" and not (rule.group or rule.group_sql):
        raise RecipeError('[split] by = "group" needs group (a regular expression) or group_sql; give one')
    if rule.test_groups and rule.by not in ("device", "group"):
        raise RecipeError(
            f'[split] test_groups = {list(rule.test_groups)} means nothing with by = "{rule.by}"; leave it out, or use '
            'by = "device" or "group"'
        )
    try:
        re.compile(rule.group)
    except re.error as error:
        raise RecipeError(f"[split] group = {rule.group!r} is not a regular expression ({error}); mend it") from error
    if rule.by == "random" and recipe.window.stride < recipe.window.rows and not rule.force:
        raise RecipeError(
            f'[split] by = "random" over windows that overlap (stride {recipe.window.stride} < rows '
            f"{recipe.window.rows}) puts nearly the same window on both sides; use device, group or time, or set "
            "force = true and do not believe the figures"
        )


def _check_features(recipe: Recipe) -> None:
    if unknown := [name for name in recipe.features.include if name not in FEATURES]:
        raise RecipeError(f"[features] include = {unknown} are no features; choose of {', '.join(FEATURES)}")


def _check_families(recipe: Recipe) -> None:
    known = FAMILIES[recipe.task]
    for family, spaces in recipe.families.items():
        if family not in known:
            raise RecipeError(f"[families.{family}] is no family for {recipe.task}; choose of {', '.join(known)}")
        for name, space in spaces.items():
            if isinstance(space, list) and not space:
                raise RecipeError(f"[families.{family}] {name} is an empty list; give values to choose from")
            if isinstance(space, Range) and (trouble := _trouble(space)):
                raise RecipeError(f"[families.{family}] {name}: {trouble}")


def _trouble(space: Range) -> str:
    """Why nothing can be drawn from a range; empty where it can."""
    if not (math.isfinite(space.low) and math.isfinite(space.high)):
        return f"low {space.low} or high {space.high} is no finite number; give both ends"
    if space.low > space.high:
        return f"low {space.low} is above high {space.high}; swap them"
    if space.step is not None and not 0 < space.step < math.inf:
        return f"step {space.step} leads nowhere; give one above 0, or leave it out"
    if not space.log:
        return ""
    if space.low <= 0:
        return f"log needs low above 0, not {space.low}"
    if space.step is not None and not (space.is_whole and space.step == 1):
        return f"log and step {space.step} cannot be together; leave one of them out"
    return ""


def _check_ranges(recipe: Recipe) -> None:
    fields = recipe.data.fields
    for name, (low, high) in recipe.checks.ranges.items():
        if name not in fields:
            raise RecipeError(f"[checks.ranges] {name} is no field; use of {', '.join(fields[:40])}")
        if not low <= high:
            raise RecipeError(f"[checks.ranges] {name} = [{low:g}, {high:g}] holds no value; give the lower one first")


def stage_tables(rollout: Rollout) -> list[dict[str, Any]]:
    """The stages in the words of a rollout's specification (`lake.rollout_spec.Stage`)."""
    return [
        {
            "percent": stage.percent,
            "tags": [stage.tag] if stage.tag else [],
            "devices": list(stage.devices),
            "bake_s": stage.bake_s,
            "approval": stage.approval,
            "max_wait_s": rollout.max_wait_s,
            "guard": dict(rollout.guard),
        }
        for stage in rollout.stages
    ]


def _check_rollout(recipe: Recipe) -> None:
    """What could not be ordered from a gateway later (see `lake.rollout_spec`)."""
    rollout = recipe.rollout
    guard = convert(rollout.guard, rollout_spec.Guard, "[rollout.guard] ")
    for number, stage in enumerate(rollout.stages, 1):
        if (stage.percent is not None) + bool(stage.tag) + bool(stage.devices) != 1:
            raise RecipeError(f"[rollout] stage {number} has none or several of percent, tag and devices; give one")
    stages = [
        msgspec.structs.replace(
            convert(table | {"guard": {}}, rollout_spec.Stage, f"[rollout] stage {number}: "), guard=guard
        )
        for number, table in enumerate(stage_tables(rollout), 1)
    ]
    try:
        spec = rollout_spec.Spec(model=recipe.name, version=1, sha256="", stages=tuple(stages), trial=recipe.trial)
        rollout_spec.check_spec(spec)
    except ConfigurationError as error:
        raise RecipeError(f"[rollout] {error}") from error
