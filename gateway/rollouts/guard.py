"""Whether the devices that run a release keep what the rollout asks of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from contract.models import ReportedModel, ReportedOrder
from lake.rollout_spec import Guard

_MOST = 0.95


def broken(
    guard: Guard, running: Sequence[ReportedModel], others: Sequence[ReportedModel], orders: Sequence[ReportedOrder]
) -> str | None:
    """What of the guard does not hold, with value and limit; None where all of it does.

    Args:
        guard: the limits.
        running: reports of the devices that run the release.
        others: reports of the devices that run another release of the model.
        orders: how the devices are with this rollout's order.
    """
    windows = sum(model.windows for model in running)
    if windows < guard.windows_min:
        return f"{windows} windows were scored, fewer than {guard.windows_min}"
    compared = sum(order.compared for order in orders)
    shares = (
        # Devices count a window that failed among `windows`, too.
        ("error", guard.error_share_max, sum(m.errors for m in running), windows),
        ("NaN", guard.nan_share_max, sum(m.nan_windows for m in running), windows),
        ("disagreement", guard.disagreement_share_max, sum(o.disagreements for o in orders), compared),
    )
    for what, limit, count, of in shares:
        if limit is not None and count > limit * of:
            return f"the {what} share is {count} of {of} windows, more than {limit:g}"
    if guard.latency_ms_p99_max is not None and running:
        latency_ms = sorted(model.latency_ms_p99 for model in running)[math.ceil(_MOST * len(running)) - 1]
        if latency_ms > guard.latency_ms_p99_max:
            return f"the p99 latency is {latency_ms:g} ms, more than {guard.latency_ms_p99_max:g} ms"
    if guard.score_mean_shift_max is not None:
        now, before = _score_mean(running), _score_mean(others)
        if now is not None and before is not None and not abs(now - before) <= guard.score_mean_shift_max:
            return (
                f"the mean score is {now:g} where other releases have {before:g}, further than "
                f"{guard.score_mean_shift_max:g}"
            )
    return None


def _score_mean(models: Sequence[ReportedModel]) -> float | None:
    """Over all windows of all devices."""
    windows = sum(model.windows for model in models)
    return sum(model.score_mean * model.windows for model in models) / windows if windows else None
