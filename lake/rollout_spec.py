"""What a rollout is told: which release, to which devices, in which stages, and when it is to stop.

It is written once into the event that creates the rollout and never changed: changing one's mind is a new rollout.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from contract.errors import ConfigurationError
from contract.models import Sha256, Trial
from contract.names import is_name

STAGES_MAX = 32
LISTED_MAX = 10_000
"""Devices or tags that one selection may list: they stand in the table as JSON."""
ROLLOUT_NAME_MAX = 63
POINTS = 10_000
"""A device's place among all is drawn from so many (`gateway.rollouts.selection`)."""

Share: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=86_400.0 * 366)]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of the specification: unknown keys are refused."""


class Selection(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which devices a rollout is about: those with one of the tags and those listed; all where neither is given."""

    tags: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


class Guard(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the devices that run the new release must keep for a stage to advance. None: not looked at."""

    latency_ms_p99_max: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Of the devices' p99 latencies, the one that 95 of 100 devices do not exceed (below 20 devices: the highest)."""
    error_share_max: Share | None = None
    """Failed windows among all windows of all devices."""
    nan_share_max: Share | None = None
    disagreement_share_max: Share | None = None
    """Shadow windows whose label was not the current model's."""
    score_mean_shift_max: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """How far the mean score may be from that of devices with another release; not looked at where there are none."""
    windows_min: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Windows that must have been scored before the guard can hold."""


class Stage(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One step: who joins, and what must be true before the next. Who joined in an earlier stage stays."""

    percent: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    """Of the rollout's devices that are known when the stage begins, rounded up; chosen by hash and counted from 0: 10,
    50, 100. Or `tags`, or `devices`."""
    tags: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    committed_share_min: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    """Committed devices among those of this stage and the earlier ones, those not seen within `max_wait_s` left out."""
    bake_s: Seconds = 300.0
    """How long the stage is watched once enough have committed."""
    max_wait_s: Annotated[float, msgspec.Meta(gt=0, le=86_400.0 * 366)] = 3_600.0
    """Devices not seen for so long are excused; a stage that cannot advance by then, bake time over, is aborted."""
    failure_share_max: Share = 0.1
    """Failed devices among those that came to an end; beyond, the rollout is aborted."""
    failures_min_executed: Annotated[int, msgspec.Meta(ge=1)] = 3
    """So many devices must have come to an end before `failure_share_max` is looked at."""
    guard: Guard = Guard()
    approval: bool = False
    """Whether a person must approve before this stage begins."""


class Spec(_Table, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rollout as it was ordered."""

    model: str
    version: Annotated[int, msgspec.Meta(ge=1)]
    sha256: Sha256
    """Of the release's ONNX file."""
    previous: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """What a rollback assigns; 0 is none. Not given: what each device says that it ran before."""
    previous_sha256: str = ""
    target: Selection = Selection()
    stages: tuple[Stage, ...]
    approval: bool = False
    """Whether a person must approve before anything begins."""
    trial: Trial = Trial()
    validity_s: Annotated[float, msgspec.Meta(ge=60, le=86_400.0 * 366)] = 7 * 86_400.0
    """A device does not begin with an order older than this; orders that wait are signed anew before."""
    rollback_on_abort: bool = True
    """Whether an abort by the controller takes the devices back at once."""


def check_spec(spec: Spec) -> None:
    """What the types alone do not say.

    Raises:
        ConfigurationError: naming member, value and remedy.
    """
    if not is_name(spec.model):
        raise ConfigurationError(f"model {spec.model[:80]!r} is not a name; use 1 to 63 of a-z 0-9 . _ -")
    if not 1 <= len(spec.stages) <= STAGES_MAX:
        raise ConfigurationError(f"there are {len(spec.stages)} stages; give 1 to {STAGES_MAX}, such as 10%,50%,100%")
    if spec.previous and not spec.previous_sha256:
        raise ConfigurationError(f"previous = {spec.previous} has no previous_sha256; give the hash of that release")
    _check_names("target", (*spec.target.tags, *spec.target.devices))
    highest = 0.0
    for number, stage in enumerate(spec.stages, 1):
        what = f"stage {number}"
        chosen = (stage.percent is not None) + bool(stage.tags) + bool(stage.devices)
        if chosen != 1:
            raise ConfigurationError(f"{what} names {chosen} kinds of devices; give one of percent, tags, devices")
        _check_names(what, (*stage.tags, *stage.devices))
        if stage.percent is not None:
            if stage.percent <= highest:
                raise ConfigurationError(
                    f"{what} is {stage.percent:g} %, not more than the {highest:g} % of an earlier one; percentages "
                    "count from 0 and must rise"
                )
            highest = stage.percent


def _check_names(what: str, names: tuple[str, ...]) -> None:
    if len(names) > LISTED_MAX:
        raise ConfigurationError(f"{what} lists {len(names)} names, more than {LISTED_MAX}; give the devices a tag")
    for name in names:
        if not is_name(name):
            raise ConfigurationError(f"{what}: {name[:80]!r} is not a name; use 1 to 63 of a-z 0-9 . _ -")
