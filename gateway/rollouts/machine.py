"""What happens next in a rollout. Pure: the rollout as its rows say, what its devices report, the time.

`decide` takes one step at most: the events of one commit. Whoever runs it, however often, on however many gateways:
the events are appended with check-and-set, so of several that decide the same, one is heard. Left alone, a rollout
that is neither paused nor waiting for approval always ends: by `max_wait_s` (or the end of the bake time, if later)
a stage either advances or is aborted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from gateway.rollouts.evidence import DeviceView, Standing, Tally, tally
from gateway.rollouts.guard import broken
from gateway.rollouts.selection import line_of
from lake.rollout_spec import Stage
from lake.rollouts import EventKind, Rollout, RolloutEvent, RolloutState

_US = 1_000_000
_ROUNDING = 1e-9
"""0.55 * 100 is a little more than 55."""


def survey(rollout: Rollout, devices: Iterable[DeviceView], now_us: int) -> Tally:
    """Count how the devices are with a rollout.

    Args:
        rollout: as of its latest row.
        devices: every device that is known, each as it last reported.
        now_us: wall clock, microseconds since 1970-01-01 UTC.
    """
    waited_us = _waited_us(rollout) if rollout.stages else None
    return tally(rollout, devices, waited_us=None if waited_us is None or now_us < waited_us else waited_us)


def decide(rollout: Rollout, found: Tally, now_us: int, who: str) -> list[RolloutEvent]:
    """The next step, if it is time for one.

    Args:
        rollout: as of its latest row.
        found: its devices, as of now (`survey`).
        now_us: wall clock, microseconds since 1970-01-01 UTC.
        who: the gateway, for the rows.

    Returns:
        The events of one commit; none where there is nothing to do but wait.
    """
    if rollout.state is not RolloutState.RUNNING:
        return []
    if rollout.passed == len(rollout.stages):
        return [_begin_next(rollout, found, now_us, who)]
    return _judge(rollout, found, now_us, who)


def hindrance(rollout: Rollout, found: Tally) -> str | None:
    """Why the latest stage may not advance, bake time aside; None where it may."""
    stage = rollout.spec.stages[rollout.stage]
    if found.members == 0:
        # A percentage of any devices is one at least; so none was heard of yet.
        return "no device is in it"
    committed = found[Standing.COMMITTED]
    if committed < _needed(stage, found):
        return (
            f"{committed} of {found.counted} devices committed, less than {stage.committed_share_min:.0%} "
            f"({_shown(found)})"
        )
    if found.joined_counted and not found.joined[Standing.COMMITTED]:
        # The devices of earlier stages may be so many that the share says nothing about those of this one.
        return f"none of the {found.joined_counted} devices that joined with this stage committed ({_shown(found)})"
    return broken(stage.guard, found.running, found.others, found.orders)


def deadline_us(rollout: Rollout) -> int:
    """When the latest stage must advance, or is aborted; wall clock, microseconds."""
    waited_us = _waited_us(rollout)
    return waited_us if rollout.baking_us is None else max(waited_us, _baked_us(rollout))


def event(
    rollout: Rollout, kind: EventKind, now_us: int, who: str, why: str, detail: dict[str, Any] | None = None
) -> RolloutEvent:
    """A row about a rollout."""
    content = msgspec.json.encode(detail or {}).decode()
    return RolloutEvent(now_us, rollout.name, rollout.spec.model, who, kind, why, content)


def _begin_next(rollout: Rollout, found: Tally, now_us: int, who: str) -> RolloutEvent:
    number = len(rollout.stages)
    stage = rollout.spec.stages[number]
    if rollout.needs_approval(number):
        why = f"stage {number + 1} ({shown_stage(stage)}) begins when somebody approves"
        return event(rollout, EventKind.APPROVAL_ASKED, now_us, who, why, {"stage": number})
    why = f"stage {number + 1} of {len(rollout.spec.stages)}: {shown_stage(stage)}"
    detail: dict[str, Any] = {"stage": number}
    if stage.percent is not None:
        detail["below"] = line_of(stage.percent, found.points)
    if found.points:
        why += f", {sum(at < detail['below'] for at in found.points)} of {len(found.points)} devices"
    return event(rollout, EventKind.STAGE_STARTED, now_us, who, why, detail)


def _judge(rollout: Rollout, found: Tally, now_us: int, who: str) -> list[RolloutEvent]:
    stage = rollout.spec.stages[rollout.stage]
    detail = {"stage": rollout.stage, "counts": found.counts()}

    def one(kind: EventKind, why: str) -> RolloutEvent:
        return event(rollout, kind, now_us, who, why, detail)

    hopeless = _hopeless(stage, found)
    if hopeless is not None:
        return _abort(rollout, one, hopeless)
    hindered = hindrance(rollout, found)
    if hindered is not None:
        if now_us < deadline_us(rollout):
            return []
        return _abort(rollout, one, f"stage {rollout.stage + 1} did not advance in {stage.max_wait_s:g} s: {hindered}")
    if stage.bake_s > 0:
        if rollout.baking_us is None:
            return [one(EventKind.BAKING, f"{_shown(found)}; watched for {stage.bake_s:g} s")]
        if now_us < _baked_us(rollout):
            return []
    if len(rollout.stages) == len(rollout.spec.stages):
        return [one(EventKind.SUCCEEDED, f"the last stage passed: {_shown(found)}")]
    passed = one(EventKind.STAGE_PASSED, f"stage {rollout.stage + 1} passed: {_shown(found)}")
    return [passed, _begin_next(rollout, found, now_us, who)]


def _hopeless(stage: Stage, found: Tally) -> str | None:
    """Why waiting is of no use, or does harm."""
    failed, executed = found[Standing.FAILED], found.executed
    told = "; ".join(found.failures)
    if executed >= stage.failures_min_executed and failed > stage.failure_share_max * executed + _ROUNDING:
        return f"{failed} of {executed} devices failed, more than {stage.failure_share_max:.0%}: {told}"
    if failed and found.counted - failed < _needed(stage, found):
        return f"{failed} of {found.counted} devices failed, so {stage.committed_share_min:.0%} cannot commit: {told}"
    joined = found.joined_counted
    if joined and found.joined[Standing.FAILED] == joined:
        return f"all {joined} devices that joined with this stage failed: {told}"
    return None


def _needed(stage: Stage, found: Tally) -> int:
    """How many must commit: one at least, whatever the share."""
    return max(1, math.ceil(stage.committed_share_min * found.counted - _ROUNDING))


def _abort(rollout: Rollout, one: Callable[[EventKind, str], RolloutEvent], why: str) -> list[RolloutEvent]:
    aborted = one(EventKind.ABORTED, why)
    if not rollout.spec.rollback_on_abort:
        return [aborted]
    return [aborted, one(EventKind.ROLLED_BACK, "the rollout was aborted; every device it reached goes back")]


def _waited_us(rollout: Rollout) -> int:
    return rollout.stage_us + round(rollout.spec.stages[rollout.stage].max_wait_s * _US)


def _baked_us(rollout: Rollout) -> int:
    return (rollout.baking_us or 0) + round(rollout.spec.stages[rollout.stage].bake_s * _US)


def _shown(found: Tally) -> str:
    parts = [f"{found[standing]} {standing.value.replace('_', ' ')}" for standing in Standing if found[standing]]
    return f"of {found.members} devices {', '.join(parts) or 'none'}"


def shown_stage(stage: Stage) -> str:
    """Who joins, for people."""
    if stage.percent is not None:
        return f"{stage.percent:g} %"
    if stage.tags:
        return "tag " + ", ".join(stage.tags)
    return f"{len(stage.devices)} listed devices"
