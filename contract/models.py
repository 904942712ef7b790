"""What trainer, gateway and device agree on about models: the manifest of a release, and the order to run one.

A release is two immutable files. `artifacts/<sha256>` is the model, ONNX. The manifest, a JSON document, names it by
hash and says what it eats and what it may cost. The manifest is a TUF target `<model>/<version>.json`
(https://theupdateframework.github.io/specification/v1.0.34/), so its bytes are vouched for by the release key, and the
model's bytes by the manifest.

Which release a device shall run is an `Assignment`, signed by the online key as a DSSE envelope
(https://github.com/secure-systems-lab/dsse) of type `ASSIGNMENT_TYPE`. The keys that may sign one are those of the
`timestamp` role of the TUF root. A device follows an assignment only when its `sequence` is higher than any it has seen
of that model: going back is a new sequence that names an old release, and an old order replayed is refused.

The model itself: one input `window: float32[batch, W, C]`, channels in the order of `fields`; outputs `score`,
optionally `label`, `nan_count: int64[batch]` and `features: float32[batch, F]`. A null value is NaN in the window.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgspec

from contract.errors import ConfigurationError
from contract.limits import PROTOCOL_VERSION
from contract.names import is_name

MODEL_BYTES_MAX = 64 * 1024 * 1024
"""One ONNX file."""
MANIFEST_BYTES_MAX = 256 * 1024
WINDOW_ROWS_MAX = 65_536
WINDOW_CELLS_MAX = 1 << 20
"""Rows times fields of one window: 4 MiB of float32."""
MODELS_MAX = 16
"""Models on one device."""
ONNX_OPSET = 22
ONNX_IR = 10
ONNX_ML_OPSET = 3
METADATA_BYTES_MAX = 4 * 1024 * 1024
"""One TUF metadata file: room for some 20,000 approved releases."""
SIGNED_AT = "x-headwater-signed-at"
"""Member of every TUF metadata file of ours: when it was signed, microseconds since 1970-01-01 UTC. A clock that is
earlier than what it already trusts was signed at is wrong."""
ASSIGNMENT_TYPE = "application/vnd.headwater.assignment+json"
"""DSSE payload type."""
INPUT = "window"
OUTPUT_SCORE, OUTPUT_LABEL, OUTPUT_NAN_COUNT, OUTPUT_FEATURES = "score", "label", "nan_count", "features"

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How windows are cut from a stream of one device.

    Readings are taken in the order in which the device recorded them. A window is complete when `rows` readings have
    come since the start of a run, and again after every further `stride`. A run ends, and the next begins empty, where
    two neighbouring readings are more than `gap_s` apart, where `ts` goes back, or where the device's epoch changes.
    """

    rows: Annotated[int, msgspec.Meta(ge=2, le=WINDOW_ROWS_MAX)]
    stride: Annotated[int, msgspec.Meta(ge=1, le=WINDOW_ROWS_MAX)]
    gap_s: Annotated[float, msgspec.Meta(gt=0, le=86_400.0 * 366)]

    @property
    def gap_us(self) -> int:
        """`gap_s` in whole microseconds, as `ts` counts: everybody who cuts windows compares with this."""
        return round(self.gap_s * 1_000_000)


class Artifact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An immutable file, by what it holds."""

    sha256: Sha256
    size: Positive
    """Bytes."""


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model may cost on a device. Beyond it, the device gives the release up."""

    memory_bytes_max: Annotated[int, msgspec.Meta(ge=1 << 20, le=1 << 34)] = 192 * 1024 * 1024
    """Resident memory of the probing process with the model loaded and run, interpreter and runtime included."""
    latency_ms_p99_max: Annotated[float, msgspec.Meta(gt=0, le=60_000.0)] = 50.0
    """One window, features included."""


class Metric(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One figure of the evaluation."""

    name: str
    value: float
    split: str
    """Of which rows, such as `test: device in (…)`."""


class Dataset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the training rows came from."""

    streams: dict[str, int]
    """Delta version of each table that was read, by stream."""
    sha256: Sha256
    """Of the windows, labels and groups as they were used."""
    windows: Positive


class Probe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Windows with known answers, for the device to try before it trusts: an artifact in Arrow IPC (see trainer)."""

    artifact: Artifact
    score_tolerance: Annotated[float, msgspec.Meta(ge=0)]
    """Largest absolute difference of a score; 0 for equal to the bit."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a release is. Members that a newer trainer adds are ignored."""

    v: int = PROTOCOL_VERSION
    model: str
    version: Positive
    artifact: Artifact
    task: str
    """`classification` or `anomaly`."""
    stream: str
    fields: tuple[str, ...]
    """Names of the channels, in their order."""
    dtypes: tuple[str, ...]
    """Arrow types of the fields as the lake has them; the window holds them as float32."""
    window: Window
    sample_rate_hz: float | None
    classes: tuple[str, ...] = ()
    """What `label` may say; empty for anomalies."""
    threshold: float | None = None
    """Anomaly: `label` is 1 where the score is above it."""
    features: tuple[str, ...]
    """Names of the columns of `features`."""
    opset: int = ONNX_OPSET
    ir: int = ONNX_IR
    family: str
    metrics: tuple[Metric, ...]
    dataset: Dataset
    recipe: str
    """The recipe as it was used, TOML."""
    code: str
    """Revision of the trainer's source, or its version."""
    seed: int
    packages: dict[str, str]
    limits: Cost = Cost()
    probe: Probe | None = None
    reference: Artifact | None = None
    """Distributions of features and scores in training, for drift: JSON (see `lake`)."""
    parent: int | None = None
    """Version that this one was trained to replace."""
    created_at_us: int


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a device tries a release before it trusts it."""

    shadow_windows: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 20
    """Windows scored beside the active model; 0 for no shadow."""
    trial_windows: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 20
    """Windows scored in front, before the commit."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86_400.0 * 30)] = 3_600.0
    """For shadow, and again for trial; beyond it the release is TIMED_OUT."""
    disagreement_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """Part of the shadow's windows in which its label is not the active model's."""
    nan_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    """Part of the windows whose score is NaN though `nan_count` is 0, or that failed."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """The order to run a release; with `version` 0 none that was ordered: the factory's answers, where there is one."""

    v: int = PROTOCOL_VERSION
    device: str
    model: str
    version: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str
    """Of the ONNX file; empty with `version` 0."""
    sequence: Positive
    """Higher than that of every earlier order for this device and model."""
    not_after_us: int
    """Not to be begun later than this, wall clock, microseconds since 1970-01-01 UTC."""
    rollout: str
    trial: Trial = Trial()


class Assignments(msgspec.Struct, frozen=True, kw_only=True):
    """Published retained on `hw/v1/assign/<device>`: the latest order of each model, each a DSSE envelope."""

    v: int = PROTOCOL_VERSION
    envelopes: tuple[dict[str, Any], ...]


class DeviceState(StrEnum):
    """Where a device is with the release it was last ordered to run. The values stand in the lake."""

    ASSIGNED = "assigned"
    """The order was read and is new; also while it waits for the clock or for the network."""
    PRECHECK = "precheck"
    DOWNLOADING = "downloading"
    VERIFIED = "verified"
    PROBED = "probed"
    SHADOW = "shadow"
    TRIAL = "trial"
    COMMITTED = "committed"
    REJECTED = "rejected"
    """Not to be trusted, or not for this device: signature, hash, expiry, sequence, schema, opset, limits."""
    FAILED = "failed"
    """It was trusted and tried, and did not do: probe, shadow, crash in trial."""
    TIMED_OUT = "timed_out"
    ROLLED_BACK = "rolled_back"
    """It had been active, and the device went back to the previous one."""
    SUPERSEDED = "superseded"
    """A newer order came first."""


FINAL_STATES = frozenset(
    {
        DeviceState.COMMITTED,
        DeviceState.REJECTED,
        DeviceState.FAILED,
        DeviceState.TIMED_OUT,
        DeviceState.ROLLED_BACK,
        DeviceState.SUPERSEDED,
    }
)


class ReportedOrder(msgspec.Struct, frozen=True, kw_only=True):
    """How far a device is with an assignment."""

    version: int
    sha256: str
    sequence: int
    rollout: str
    state: DeviceState
    reason: str = ""
    """Why it ended as it did: names the thing, the value and the remedy."""
    since_us: int
    """Wall clock when this state was entered."""
    windows: int = 0
    """Scored by this release in shadow and trial, failures included."""
    compared: int = 0
    """Shadow windows that both models scored."""
    disagreements: int = 0


class ReportedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model on a device. Counters run since the active version was loaded, in this run of the agent."""

    active: int
    """Version that answers, or is being loaded; 0 for none that was ordered."""
    active_sha256: str = ""
    previous: int = 0
    """Version that was active before it, and to which a rollback would lead; 0 for none that was ordered."""
    previous_sha256: str = ""
    factory: int = 0
    """Version of the factory's release, where that answers: no order brought it, and order 0 leads back to it."""
    windows: int = 0
    skipped: int = 0
    """Windows left out because the worker was busy."""
    errors: int = 0
    nan_windows: int = 0
    """Windows with `nan_count` above 0, or a score that is NaN."""
    latency_ms_p50: float = 0.0
    latency_ms_p99: float = 0.0
    score_mean: float = 0.0
    order: ReportedOrder | None = None
    """The latest assignment that was read; None where there never was one."""


def target_path(model: str, version: int) -> str:
    """The TUF target that a release's manifest is."""
    return f"{model}/{version}.json"


def manifest_object(model: str, version: int, sha256: str) -> str:
    """Where a release's manifest is, relative to the folder `models/`: as TUF's consistent snapshots have it."""
    return f"targets/{model}/{sha256}.{version}.json"


def artifact_path(sha256: str) -> str:
    """Where an artifact is, relative to the folder `models/` of the lake, or to the URL that serves it."""
    return f"artifacts/{sha256}"


def check_manifest(manifest: Manifest) -> None:
    """What the types alone do not say.

    Raises:
        ConfigurationError: naming member, value and remedy.
    """
    for what, name in (("model", manifest.model), ("stream", manifest.stream)):
        if not is_name(name):
            raise ConfigurationError(f"{what} {name[:80]!r} is not a name; use 1 to 63 of a-z 0-9 . _ -")
    if manifest.artifact.size > MODEL_BYTES_MAX:
        raise ConfigurationError(
            f"the model has {manifest.artifact.size} bytes, more than {MODEL_BYTES_MAX}; train a smaller one"
        )
    if not manifest.fields or len(set(manifest.fields)) != len(manifest.fields):
        raise ConfigurationError(f"fields {list(manifest.fields)} are none or repeat; name every channel once")
    if len(manifest.dtypes) != len(manifest.fields):
        raise ConfigurationError(
            f"there are {len(manifest.fields)} fields but {len(manifest.dtypes)} dtypes; give one for each field"
        )
    if manifest.window.rows * len(manifest.fields) > WINDOW_CELLS_MAX:
        raise ConfigurationError(
            f"a window of {manifest.window.rows} x {len(manifest.fields)} has more than {WINDOW_CELLS_MAX} cells; "
            "take fewer rows or fields"
        )
