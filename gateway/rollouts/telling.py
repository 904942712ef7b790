"""A rollout as JSON, the same over HTTP and on the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from contract.models import DeviceState
from gateway.rollouts.evidence import Tally
from gateway.rollouts.machine import deadline_us, hindrance, shown_stage
from lake.rollouts import Rollout, RolloutEvent, RolloutState

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def time_of(at_us: int | None) -> str | None:
    """ISO 8601, UTC, microseconds."""
    if at_us is None:
        return None
    try:
        return (_EPOCH + timedelta(microseconds=at_us)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return None


def rollout_json(rollout: Rollout) -> dict[str, Any]:
    """What its rows say."""
    spec = rollout.spec
    reached = rollout.stage >= 0
    return {
        "rollout": rollout.name,
        "model": spec.model,
        "version": spec.version,
        "previous": spec.previous,
        "state": rollout.state,
        "stage": rollout.stage + 1,
        "stages": [shown_stage(stage) for stage in spec.stages],
        "passed": rollout.passed,
        "awaiting": rollout.awaiting + 1 if rollout.state is RolloutState.APPROVAL else None,
        "since": time_of(rollout.changed_us),
        "by": rollout.changed_by,
        "reason": rollout.reason,
        "created": time_of(rollout.created_us),
        "created_by": rollout.who,
        "why": rollout.why,
        "baking_since": time_of(rollout.baking_us),
        "deadline": time_of(deadline_us(rollout)) if reached and rollout.state is RolloutState.RUNNING else None,
        "sequences": list(rollout.stages),
        "rollback_sequence": rollout.rollback,
    }


def detail_json(rollout: Rollout) -> dict[str, Any]:
    """The same with what was ordered."""
    return rollout_json(rollout) | {"spec": msgspec.to_builtins(rollout.spec)}


def tally_json(rollout: Rollout, found: Tally) -> dict[str, Any]:
    """How its devices are, as one gateway knows them."""
    refused = found.back[DeviceState.REJECTED.value]
    waits_for = None
    if rollout.state is RolloutState.RUNNING and rollout.stage >= 0:
        waits_for = hindrance(rollout, found)
    elif refused:
        waits_for = f"{refused} of {found.back.total()} devices refused their order back, and get it again"
    return {
        "devices": found.counts(),
        "states": dict(found.states),
        "failures": found.failures,
        "back": dict(found.back),
        "back_refused": refused,
        "waits_for": waits_for,
    }


def event_json(event: RolloutEvent) -> dict[str, Any]:
    """One row."""
    return {
        "at": time_of(event.at_us),
        "rollout": event.rollout,
        "model": event.model,
        "sequence": event.sequence,
        "who": event.who,
        "event": event.event,
        "why": event.why,
        "detail": msgspec.Raw(event.detail.encode()),
    }
