"""Who is in which stage: a pure function of names, so that every gateway, today and after a restart, says the same."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from lake.rollout_spec import Selection, Spec, Stage

POINTS = 10_000
"""A device's place among all is drawn from so many: percentages have two decimals."""


def point(rollout: str, device: str) -> int:
    """Where a device stands in a rollout, 0 .. 9,999, spread evenly and anew by each rollout.

    SHA-256 of `rollout/device` (no name has a slash), its first 8 bytes as a big-endian number, modulo 10,000.
    """
    return int.from_bytes(hashlib.sha256(f"{rollout}/{device}".encode()).digest()[:8], "big") % POINTS


def is_target(target: Selection, device: str, tags: Collection[str]) -> bool:
    """Whether a rollout is about a device at all."""
    if not target.tags and not target.devices:
        return True
    return device in target.devices or any(tag in tags for tag in target.tags)


def stage_of(rollout: str, spec: Spec, device: str, tags: Collection[str], reached: int) -> int | None:
    """The first of the `reached` stages (counted from 0) that a device is in; None where it is in none of them."""
    if not reached or not is_target(spec.target, device, tags):
        return None
    at = point(rollout, device)
    return next((number for number in range(reached) if _joins(spec.stages[number], device, tags, at)), None)


def by_names(spec: Spec, reached: int) -> bool:
    """Whether tags or lists have a say in who is in the `reached` stages."""
    target = spec.target
    return bool(target.tags or target.devices) or any(stage.percent is None for stage in spec.stages[:reached])


def _joins(stage: Stage, device: str, tags: Collection[str], at: int) -> bool:
    if stage.percent is not None:
        return at < stage.percent * (POINTS / 100)
    return device in stage.devices or any(tag in tags for tag in stage.tags)
