"""What devices say about a rollout, judged and counted. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import NamedTuple

import msgspec

from contract.models import FINAL_STATES, DeviceState, ReportedModel, ReportedOrder
from gateway.rollouts.selection import Membership, next_percentage, point
from lake.rollouts import Rollout

REASONS_MAX = 5
"""Failed devices that are named in the reason of an abort."""


class DeviceView(NamedTuple):
    """A device as a rollout of one model sees it."""

    name: str
    tags: Collection[str] = ()
    online: bool | None = None
    """None: it never said."""
    presence_us: int | None = None
    """When `online` last changed, gateway wall clock."""
    model: ReportedModel | None = None
    """What it last reported of the model; None where it never reported it."""

    @property
    def order(self) -> ReportedOrder | None:
        """The latest order of the model that it read."""
        return None if self.model is None else self.model.order


class Standing(StrEnum):
    """Where a device of a reached stage is."""

    COMMITTED = "committed"
    FAILED = "failed"
    """Came to an end that is not a commit."""
    UNDER_WAY = "under_way"
    """Has read the order."""
    WAITING = "waiting"
    """Was seen since its stage began, but has not read the order."""
    UNSEEN = "unseen"
    """Was not seen since its stage, the latest, began."""
    EXCUSED = "excused"
    """Was not seen for so long that nobody waits for it any more. When it returns, it gets the order of that day, and
    is counted again once it has come to an end."""


class Tally(msgspec.Struct, kw_only=True):
    """The devices of all reached stages, counted."""

    members: int = 0
    standings: Counter[Standing] = msgspec.field(default_factory=Counter)
    joined: Counter[Standing] = msgspec.field(default_factory=Counter)
    """Of them, those that joined with the latest stage."""
    states: Counter[str] = msgspec.field(default_factory=Counter)
    """By the state they reported for this rollout's order."""
    failures: list[str] = []
    """The first few, with what they say."""
    running: list[ReportedModel] = []
    """What those that run the release report."""
    others: list[ReportedModel] = []
    """What devices report that run another release of the model."""
    orders: list[ReportedOrder] = []
    """Orders of this rollout, as reported."""
    points: list[int] = []
    """Of all devices that the rollout is about, where the next stage is a percentage of them."""
    back: Counter[str] = msgspec.field(default_factory=Counter)
    """Devices that have read the order back, by the state they reported for it."""

    def __getitem__(self, standing: Standing) -> int:
        return self.standings[standing]

    @property
    def executed(self) -> int:
        """Devices that came to an end."""
        return self[Standing.COMMITTED] + self[Standing.FAILED]

    @property
    def counted(self) -> int:
        """Devices that the stage is judged by."""
        return self.members - self[Standing.EXCUSED]

    @property
    def joined_counted(self) -> int:
        """Devices that joined with the latest stage, and that it is judged by."""
        return self.joined.total() - self.joined[Standing.EXCUSED]

    def counts(self) -> dict[str, int]:
        """For people and for the table."""
        return {"members": self.members} | {standing.value: self.standings[standing] for standing in Standing}


def took(rollout: Rollout, device: DeviceView) -> bool:
    """Whether a device has read an order of this rollout to run its release."""
    order = device.order
    return order is not None and order.rollout == rollout.name and order.sequence in rollout.stages


def went_back(rollout: Rollout, device: DeviceView) -> bool:
    """Whether a device has read the rollout's order back, and perhaps refused it."""
    order = device.order
    return order is not None and order.rollout == rollout.name and order.sequence == rollout.rollback


def standing_of(rollout: Rollout, stage: int, device: DeviceView, *, waited_us: int | None) -> Standing:
    """Where a device of a stage is.

    Not seen is who is offline, went offline before the stage began, and has not read the order. A device that read
    it and then fell silent is never excused: the release may be why. Who comes (back) after the stage has waited long
    enough stays excused until it has come to an end: while a stage is watched for a day devices come and go, and a
    release that was good enough to be watched must not be taken back from all because one of them has yet to fetch it.

    Args:
        rollout: as of now.
        stage: the first that the device is in.
        device: what is known of it.
        waited_us: since when the latest stage has waited long enough, wall clock; None while it has not. Who was not
            seen in an earlier one is excused.
    """
    order = device.order
    late = waited_us is not None and (device.presence_us or 0) >= waited_us
    if order is None or not took(rollout, device):
        if late:
            return Standing.EXCUSED
        latest = stage == rollout.stage
        if device.online is True or (latest and (device.presence_us or 0) >= rollout.stage_us):
            return Standing.WAITING
        return Standing.UNSEEN if latest and waited_us is None else Standing.EXCUSED
    if order.state is DeviceState.COMMITTED:
        return Standing.COMMITTED
    if order.state in FINAL_STATES and order.state is not DeviceState.SUPERSEDED:
        return Standing.FAILED
    return Standing.EXCUSED if late and device.online is True else Standing.UNDER_WAY


def tally(rollout: Rollout, devices: Iterable[DeviceView], *, waited_us: int | None) -> Tally:
    """Count the devices of the stages that were reached.

    Args:
        rollout: as of now.
        devices: all there are.
        waited_us: see `standing_of`.
    """
    found = Tally()
    spec, who, drawing = rollout.spec, Membership(rollout), next_percentage(rollout) is not None
    for device in devices:
        if drawing and who.is_target(device.name, device.tags):
            found.points.append(point(rollout.name, device.name))
        model = device.model
        if model is not None and (model.active or model.factory) and model.active != spec.version:
            found.others.append(model)
        if device.order is not None and went_back(rollout, device):
            found.back[device.order.state.value] += 1
        stage = who.stage_of(device.name, device.tags)
        if stage is None:
            if not took(rollout, device):
                continue
            stage = 0  # it was a member when it took the order, whatever its tags say now
        found.members += 1
        standing = standing_of(rollout, stage, device, waited_us=waited_us)
        found.standings[standing] += 1
        if stage == rollout.stage:
            found.joined[standing] += 1
        order = device.order
        if order is None or not took(rollout, device):
            continue
        found.states[order.state.value] += 1
        found.orders.append(order)
        if standing is Standing.FAILED and len(found.failures) < REASONS_MAX:
            found.failures.append(f"{device.name} {order.state}: {order.reason[:200] or 'no reason given'}")
        if model is not None and model.active == spec.version:
            found.running.append(model)
    return found
