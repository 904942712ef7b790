"""Devices that answer orders, without models: a pure one, and what a rollout is told in tests.

`SimulatedDevice` keeps the rules of `contract.models` for orders: it follows what is newer than all it has read, walks
through the states of `DeviceState`, and says so in its reported document. `tests/integration/rollout_fleet.py` puts it
behind a real broker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from contract.messages import Reported
from contract.models import (
    FINAL_STATES,
    Artifact,
    Assignment,
    Dataset,
    DeviceState,
    Manifest,
    ReportedModel,
    ReportedOrder,
    Window,
)
from lake.rollout_spec import Guard, Spec, Stage
from lake.rollouts import RolloutEvent

MODEL = "wear"
WALK = (
    DeviceState.ASSIGNED,
    DeviceState.PRECHECK,
    DeviceState.DOWNLOADING,
    DeviceState.VERIFIED,
    DeviceState.PROBED,
    DeviceState.SHADOW,
    DeviceState.TRIAL,
    DeviceState.COMMITTED,
)
Fate = Callable[[Assignment], DeviceState | None]
"""How an order ends on a device: a final state, or None for never."""


def sha_of(version: int) -> str:
    """The hash of a release that nobody made."""
    return f"{version:064x}" if version else ""


def commits(order: Assignment) -> DeviceState | None:
    """Every release is good."""
    return DeviceState.COMMITTED


def spec(version: int = 2, *, stages: tuple[Stage, ...] = (), **changes: Any) -> Spec:
    """A rollout of `MODEL`: 10 %, half, all, without bake time."""
    if not stages:
        stages = tuple(
            Stage(percent=percent, bake_s=0, max_wait_s=60.0, committed_share_min=0.9, guard=Guard(error_share_max=0.2))
            for percent in (10, 50, 100)
        )
    return Spec(model=changes.pop("model", MODEL), version=version, sha256=sha_of(version), stages=stages, **changes)


def numbered(events: Sequence[RolloutEvent], version: int) -> list[RolloutEvent]:
    """Events as they stand in the table when they are committed on top of `version`."""
    return [event._replace(sequence=version + 1, place=place) for place, event in enumerate(events)]


class SimulatedDevice:
    """One device.

    Args:
        name: its name.
        tags: what it says it is.
        fate: how orders end on it.
        figures: members of `ReportedModel` that it reports while a version is active, by version.
        refuses: whether an order is rejected now; it may be followed when it comes again.
    """

    def __init__(
        self,
        name: str,
        *,
        tags: tuple[str, ...] = (),
        fate: Fate = commits,
        figures: Mapping[int, Mapping[str, Any]] | None = None,
        refuses: Callable[[Assignment], bool] = lambda order: False,
    ) -> None:
        self.name, self.tags, self.fate, self.refuses = name, tags, fate, refuses
        self.figures = figures or {}
        self.read: list[Assignment] = []
        """Every order that it followed, as it came."""
        self.active: dict[str, int] = {}
        """Version of each model; survives restarts, like `_latest`."""
        self.previous: dict[str, int] = {}
        """Version that was active before."""
        self.before: dict[str, int] = {}
        """By rollout: what was active when its first order was read."""
        self._latest: dict[str, tuple[Assignment, DeviceState, str]] = {}

    def receive(self, order: Assignment) -> bool:
        """Whether the order is new, and is followed."""
        assert order.device == self.name
        latest = self._latest.get(order.model)
        again = latest is not None and order.sequence == latest[0].sequence and latest[1] is DeviceState.REJECTED
        if latest is not None and order.sequence <= latest[0].sequence and not again:
            return False
        if not again:
            self.read.append(order)
            self.before.setdefault(order.rollout, self.active.get(order.model, 0))
        self._latest[order.model] = order, DeviceState.ASSIGNED, ""
        return True

    def step(self) -> bool:
        """Go one state further with each order; whether there is anything new to report."""
        moved = False
        for model, (order, state, _) in list(self._latest.items()):
            if state not in FINAL_STATES:
                after = self._next(order, state)
                if after is not None:
                    self._latest[model] = order, after, "" if after is not DeviceState.FAILED else "the probe differs"
                    moved = True
        return moved

    def state(self, model: str = MODEL) -> DeviceState | None:
        """Where it is with the latest order."""
        latest = self._latest.get(model)
        return None if latest is None else latest[1]

    def reported(self, now_us: int = 0) -> Reported:
        """What it says."""
        models = {}
        for model, (order, state, reason) in self._latest.items():
            version = self.active.get(model, 0)
            said = ReportedOrder(
                version=order.version,
                sha256=order.sha256,
                sequence=order.sequence,
                rollout=order.rollout,
                state=state,
                reason=reason,
                since_us=now_us,
            )
            figures: dict[str, Any] = {"windows": 100, "latency_ms_p99": 3.0} | dict(self.figures.get(version, {}))
            previous = self.previous.get(model, 0)
            models[model] = ReportedModel(
                active=version,
                active_sha256=sha_of(version),
                previous=previous,
                previous_sha256=sha_of(previous),
                order=said,
                **figures,
            )
        return Reported(
            revision=0,
            agent="simulated/1",
            boot="ab" * 16,
            clock_synced=True,
            started_at_us=1,
            streams={},
            models=models,
            tags=self.tags,
        )

    def _next(self, order: Assignment, state: DeviceState) -> DeviceState | None:
        if state is DeviceState.ASSIGNED and self.refuses(order):
            return DeviceState.REJECTED
        if order.version in (0, self.active.get(order.model, 0)):
            self._activate(order)  # nothing to fetch or to try
            return DeviceState.COMMITTED
        after = WALK[WALK.index(state) + 1]
        if after is not DeviceState.COMMITTED:
            return after
        end = self.fate(order)
        if end is DeviceState.COMMITTED:
            self._activate(order)
        return end

    def _activate(self, order: Assignment) -> None:
        now = self.active.get(order.model, 0)
        if now != order.version:
            self.previous[order.model], self.active[order.model] = now, order.version


def manifest_of(model: str) -> Manifest:
    """Of a release that is never run."""
    return Manifest(
        model=model,
        version=1,
        artifact=Artifact(sha256="0" * 64, size=1),
        task="anomaly",
        stream="vibration",
        fields=("x",),
        dtypes=("double",),
        window=Window(rows=8, stride=8, gap_s=1.0),
        sample_rate_hz=None,
        threshold=0.5,
        features=("x_mean",),
        family="test",
        metrics=(),
        dataset=Dataset(streams={"vibration": 1}, sha256="0" * 64, windows=1),
        recipe="",
        code="test",
        seed=1,
        packages={},
        created_at_us=1,
    )
