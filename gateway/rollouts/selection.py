"""Who is in which stage: follows from names and from the rollout's rows, so every gateway, today and after a restart,
says the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from lake.rollout_spec import POINTS, Spec, Stage
from lake.rollouts import Rollout

_ROUNDING = 1e-9


def point(rollout: str, device: str) -> int:
    """Where a device stands in a rollout, 0 .. 9,999, spread evenly and anew by each rollout.

    SHA-256 of `rollout/device` (no name has a slash), its first 8 bytes as a big-endian number, modulo 10,000.
    """
    return int.from_bytes(hashlib.sha256(f"{rollout}/{device}".encode()).digest()[:8], "big") % POINTS


def line_of(percent: float, points: Sequence[int]) -> int:
    """The point below which a device is in a percentage of the devices there are, rounded up: of eight, 10 % is one.

    Args:
        percent: above 0, at most 100.
        points: of all devices that the rollout is about, in any order.
    """
    if percent >= 100:
        return POINTS
    if not points:
        return math.ceil(percent * (POINTS / 100))
    count = max(1, math.ceil(percent / 100 * len(points) - _ROUNDING))
    return sorted(points)[count - 1] + 1


class _Names(NamedTuple):
    """As sets: what is listed may be thousands, and every device is looked for."""

    tags: frozenset[str]
    devices: frozenset[str]
    line: int = 0
    """Devices whose point is below it."""

    def has(self, device: str, tags: Collection[str]) -> bool:
        return device in self.devices or not self.tags.isdisjoint(tags)


class Membership:
    """Who is in the stages that a rollout has reached.

    Args:
        rollout: as of its latest row.
    """

    def __init__(self, rollout: Rollout) -> None:
        spec = rollout.spec
        self._rollout = rollout.name
        self._target = _Names(frozenset(spec.target.tags), frozenset(spec.target.devices))
        self._all = not spec.target.tags and not spec.target.devices
        self._stages = [
            _Names(frozenset(stage.tags), frozenset(stage.devices), line)
            for stage, line in zip(spec.stages, rollout.lines, strict=False)
        ]

    def is_target(self, device: str, tags: Collection[str]) -> bool:
        """Whether the rollout is about a device at all."""
        return self._all or self._target.has(device, tags)

    def stage_of(self, device: str, tags: Collection[str]) -> int | None:
        """The first of the reached stages (counted from 0) that a device is in; None where it is in none of them."""
        if not self._stages or not self.is_target(device, tags):
            return None
        at: int | None = None
        for number, stage in enumerate(self._stages):
            if stage.line and at is None:
                at = point(self._rollout, device)
            if (at is not None and at < stage.line) or stage.has(device, tags):
                return number
        return None


def next_percentage(rollout: Rollout) -> float | None:
    """Of the stage that begins next, where it is a percentage that depends on how many devices there are."""
    stage = _next(rollout.spec, len(rollout.stages))
    return stage.percent if stage is not None and stage.percent is not None and stage.percent < 100 else None


def _next(spec: Spec, reached: int) -> Stage | None:
    return spec.stages[reached] if reached < len(spec.stages) else None
