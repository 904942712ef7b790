"""`recipe.toml`: everything that decides which model comes out, in one file that is kept with the release.

These are its tables and keys; `trainer.recipe_file` reads and checks it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from contract.models import Cost, Trial, Window
from lake.monitoring import policy

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
    """Rows of a device with a `ts` that it had before."""
    stuck_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """A field that keeps one value for longer than this on some device is stuck: a warning."""
    stuck_share_fail: Share = 0.5
    """Part of a device's rows within such stretches."""
    unwindowed_share_warn: Share = 0.1
    unwindowed_share_fail: Share = 0.5
    """Part of the rows that stand in no window, beyond those that a long stride leaves out."""
    dropped_share_warn: Share = 0.5
    """Part of the windows that are left out because of their labels."""
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
