"""Which orders a device shall have now: a pure function of all rollouts and of what the device is. No memory.

For each model the rollouts are asked, that with the latest orders first, and the first that has a say decides. So a
device that was away for three rollouts gets one order, that of today.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from contract.models import FINAL_STATES, DeviceState, ReportedModel, ReportedOrder, Trial
from gateway.rollouts.evidence import DeviceView, took, went_back
from gateway.rollouts.selection import Membership
from lake.rollouts import Rollout, RolloutBook, RolloutState

_HOLDING = frozenset({RolloutState.PAUSED, RolloutState.ABORTED})
"""Gives orders to nobody, and takes none away from who has read one."""
_INSISTING = frozenset({RolloutState.SUCCEEDED, RolloutState.ROLLED_BACK})
"""Wants its orders followed, however often a device has refused them: nobody counts refusals as failures any more."""


class Order(NamedTuple):
    """What becomes an `Assignment` when it is signed."""

    model: str
    version: int
    sha256: str
    sequence: int
    rollout: str
    trial: Trial
    validity_s: float
    insists: bool
    """Whether it is given again to a device that refused it: it may have been refused for a passing reason."""


class Wanted(NamedTuple):
    """What a device shall have."""

    orders: tuple[Order, ...]
    lacking: bool
    """Whether it has, as it last reported, not read one of them, or refused one that insists."""
    withheld: bool
    """Whether an order was perhaps published that it shall not read any more."""
    unsettled: bool
    """Whether one that insists may still be refused: when it was told last is not to be forgotten yet."""


NOTHING = Wanted((), False, False, False)


class Targets:
    """The orders that follow from the rollouts as of one version of their table.

    Args:
        book: all rollouts.
    """

    def __init__(self, book: RolloutBook) -> None:
        self._by_model: dict[str, list[Rollout]] = {}
        self._members: dict[str, Membership] = {}
        for rollout in sorted(book.rollouts.values(), key=lambda rollout: -rollout.latest):
            if rollout.began:
                self._by_model.setdefault(rollout.spec.model, []).append(rollout)

    def __bool__(self) -> bool:
        """Whether any device may have an order."""
        return bool(self._by_model)

    def of(self, name: str, tags: Collection[str], models: Mapping[str, ReportedModel]) -> Wanted:
        """What a device shall have.

        Args:
            name: the device.
            tags: what it says it is.
            models: what it last reported of each model.
        """
        orders, lacking, withheld, unsettled = [], False, False, False
        for model, rollouts in self._by_model.items():
            reported = models.get(model)
            view = DeviceView(name, tags, model=reported)
            order, held = _decided(rollouts, self._members_of, view)
            withheld |= held
            if order is not None:
                orders.append(order)
                lacking |= not _has_read(order, view.order)
                unsettled |= not _is_settled(order, view.order)
        return Wanted(tuple(orders), lacking, withheld, unsettled) if orders or withheld else NOTHING

    def _members_of(self, rollout: Rollout) -> Membership:
        """Made when it is asked for: most rollouts of old never are, and they may list thousands."""
        found = self._members.get(rollout.name)
        if found is None:
            found = self._members[rollout.name] = Membership(rollout)
        return found


def _has_read(order: Order, latest: ReportedOrder | None) -> bool:
    """Whether the order that a device reported last is this one, or came after it.

    An order that it refused proves nothing by a higher number: anybody may have written it.
    """
    if latest is None:
        return False
    if latest.state is DeviceState.REJECTED:
        return latest.sequence == order.sequence and not order.insists
    return latest.sequence >= order.sequence


def _is_settled(order: Order, latest: ReportedOrder | None) -> bool:
    if not order.insists or latest is None or latest.sequence != order.sequence:
        return True
    return latest.state in FINAL_STATES and latest.state is not DeviceState.REJECTED


def _decided(
    rollouts: Sequence[Rollout], members_of: Callable[[Rollout], Membership], device: DeviceView
) -> tuple[Order | None, bool]:
    """The order of the first rollout that has a say, and whether one that holds was passed on the way."""
    withheld = False
    for rollout in rollouts:
        stage = members_of(rollout).stage_of(device.name, device.tags)
        has_read = took(rollout, device)
        if rollout.rollback is not None:
            if has_read or went_back(rollout, device) or _still_runs(rollout, stage, device):
                return _back(rollout, rollout.rollback, rollouts, device), withheld
            withheld |= stage is not None
            continue
        if stage is None and not has_read:
            continue
        if rollout.state in _HOLDING and not has_read:
            withheld = True
            continue
        read = device.order if has_read else None
        sequence = read.sequence if read is not None else rollout.stages[stage or 0]
        return _order(rollout, rollout.spec.version, rollout.spec.sha256, sequence), withheld
    return None, withheld


def _still_runs(rollout: Rollout, stage: int | None, device: DeviceView) -> bool:
    """Whether a device runs the release by an order that it has read, though it reports another order since.

    Such as the order back from a newer rollout, or a forged one that it refused.
    """
    order = device.order
    if stage is None or device.model is None or order is None or device.model.active != rollout.spec.version:
        return False
    return order.sequence > rollout.began or order.state is DeviceState.REJECTED


def _back(rollout: Rollout, sequence: int, rollouts: Sequence[Rollout], device: DeviceView) -> Order:
    """The order to run what was there before the rollout."""
    spec = rollout.spec
    if spec.previous is None:
        version, sha256 = _before(rollout, rollouts, device)
    else:
        version, sha256 = spec.previous, spec.previous_sha256
    # It was trusted before. Compared with the release that is being taken back, it could only lose.
    trial = Trial(
        shadow_windows=0, trial_windows=1, timeout_s=spec.trial.timeout_s, disagreement_share_max=1.0, nan_share_max=1.0
    )
    return _order(rollout, version, sha256, sequence)._replace(trial=trial)


def _before(rollout: Rollout, rollouts: Sequence[Rollout], device: DeviceView) -> tuple[int, str]:
    """Version and hash of what a device ran before a rollout, as it says itself; 0 where that was none.

    The answer stays the same while the device goes back, and what was active becomes what is previous.
    """
    model, order = device.model, device.order
    if model is None or order is None:
        return 0, ""
    if went_back(rollout, device) and order.state is not DeviceState.REJECTED:
        return order.version, order.sha256
    if model.active != rollout.spec.version:
        return model.active, model.active_sha256
    # What a newer rollout brought, and took back, was not there before this one.
    later = {each.spec.version for each in rollouts if each.began >= rollout.began}
    return (0, "") if model.previous in later else (model.previous, model.previous_sha256)


def _order(rollout: Rollout, version: int, sha256: str, sequence: int) -> Order:
    spec = rollout.spec
    insists = rollout.state in _INSISTING
    return Order(spec.model, version, sha256, sequence, rollout.name, spec.trial, spec.validity_s, insists)
