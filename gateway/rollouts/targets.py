"""Which orders a device shall have now: a pure function of all rollouts and of what the device is. No memory.

For each model the rollouts are asked, that with the latest orders first, and the first that has a say decides. So a
device that was away for three rollouts gets one order, that of today.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from contract.models import DeviceState, ReportedModel, ReportedOrder, Trial
from gateway.rollouts.evidence import DeviceView, took
from gateway.rollouts.selection import stage_of
from lake.rollouts import Rollout, RolloutBook, RolloutState

_HOLDING = frozenset({RolloutState.PAUSED, RolloutState.ABORTED})
"""Gives orders to nobody, and takes none away from who has read one."""


class Order(NamedTuple):
    """What becomes an `Assignment` when it is signed."""

    model: str
    version: int
    sha256: str
    sequence: int
    rollout: str
    trial: Trial
    validity_s: float


class Wanted(NamedTuple):
    """What a device shall have."""

    orders: tuple[Order, ...]
    lacking: bool
    """Whether it has, as it last reported, not read one of them."""
    withheld: bool
    """Whether an order was perhaps published that it shall not read any more."""


NOTHING = Wanted((), False, False)


class Targets:
    """The orders that follow from the rollouts as of one version of their table.

    Args:
        book: all rollouts.
    """

    def __init__(self, book: RolloutBook) -> None:
        self._by_model: dict[str, list[Rollout]] = {}
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
        orders, lacking, withheld = [], False, False
        for model, rollouts in self._by_model.items():
            reported = models.get(model)
            view = DeviceView(name, tags, model=reported)
            order, held = _decided(rollouts, view)
            withheld |= held
            if order is not None:
                orders.append(order)
                lacking |= not _has_read(order, None if reported is None else reported.order)
        return Wanted(tuple(orders), lacking, withheld) if orders or withheld else NOTHING


def _has_read(order: Order, latest: ReportedOrder | None) -> bool:
    """Whether the order that a device reported last is this one, or came after it.

    An order that it refused proves nothing by its number: anybody may have written it.
    """
    if latest is None or latest.sequence == order.sequence:
        return latest is not None
    return latest.sequence > order.sequence and latest.state is not DeviceState.REJECTED


def _decided(rollouts: Iterable[Rollout], device: DeviceView) -> tuple[Order | None, bool]:
    """The order of the first rollout that has a say, and whether one that holds was passed on the way."""
    withheld = False
    rest = iter(rollouts)
    for rollout in rest:
        stage = stage_of(rollout.name, rollout.spec, device.name, device.tags, len(rollout.stages))
        has_read = took(rollout, device)
        if stage is None and not has_read and not _went_back(rollout, device):
            continue
        if rollout.rollback is not None:
            return _back(rollout, rollout.rollback, rest, device), withheld
        if rollout.state in _HOLDING and not has_read:
            withheld = True
            continue
        read = device.order if has_read else None
        sequence = read.sequence if read is not None else rollout.stages[stage or 0]
        return _order(rollout, rollout.spec.version, rollout.spec.sha256, sequence), withheld
    return None, withheld


def _back(rollout: Rollout, sequence: int, older: Iterable[Rollout], device: DeviceView) -> Order:
    """The order to run what was there before the rollout."""
    spec = rollout.spec
    version, sha256 = spec.previous or 0, spec.previous_sha256
    if spec.previous is None:
        before, _ = _decided((each for each in older if each.began < rollout.began), device)
        version, sha256 = (0, "") if before is None else (before.version, before.sha256)
    # It was trusted before. Compared with the release that is being taken back, it could only lose.
    trial = Trial(
        shadow_windows=0, trial_windows=1, timeout_s=spec.trial.timeout_s, disagreement_share_max=1.0, nan_share_max=1.0
    )
    return _order(rollout, version, sha256, sequence)._replace(trial=trial)


def _went_back(rollout: Rollout, device: DeviceView) -> bool:
    """Whether the device has read the rollout's order back: it stays a member, whatever its tags say now."""
    order = device.order
    return order is not None and order.rollout == rollout.name and order.sequence == rollout.rollback


def _order(rollout: Rollout, version: int, sha256: str, sequence: int) -> Order:
    spec = rollout.spec
    return Order(spec.model, version, sha256, sequence, rollout.name, spec.trial, spec.validity_s)
