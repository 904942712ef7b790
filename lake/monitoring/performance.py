"""How releases do on devices: exact figures over a stretch of time, by SQL over `predictions.<model>`."""

from __future__ import annotations

from datetime import datetime

import msgspec

from contract.names import PREDICTIONS_PREFIX
from lake.duck import identifier
from lake.query import Lake

_FIGURES = """
SELECT release, _device AS device, count(*) AS windows,
       epoch_us(min(ts)) AS first_us, epoch_us(max(ts)) AS last_us,
       quantile_cont(latency_us, 0.5) / 1000.0 AS p50, quantile_cont(latency_us, 0.99) / 1000.0 AS p99,
       avg(CASE WHEN nan_count > 0 OR score IS NULL OR isnan(score) THEN 1.0 ELSE 0.0 END) AS nan_share,
       avg(score) FILTER (NOT isnan(score)) AS score_mean, stddev_samp(score) FILTER (NOT isnan(score)) AS score_sd,
       count(shadow_label) AS compared,
       count(*) FILTER (shadow_label IS NOT NULL AND shadow_label <> label) AS disagreements
FROM {source} WHERE ts >= {since} GROUP BY ALL ORDER BY release, device
"""
_LABELS = """
SELECT release, _device AS device, label, count(*) AS windows
FROM {source} WHERE ts >= {since} GROUP BY ALL ORDER BY ALL
"""


class Performance(msgspec.Struct, frozen=True, kw_only=True):
    """One release on one device."""

    release: int
    device: str
    windows: int
    first_us: int
    last_us: int
    rate_per_s: float
    """Windows per second of the device's clock."""
    latency_ms_p50: float
    latency_ms_p99: float
    nan_share: float
    """Windows with a missing value, or without a score."""
    score_mean: float | None
    score_sd: float | None
    labels: dict[str, float]
    """Share of each label."""
    compared: int
    """Windows that a candidate scored beside it."""
    disagreements: int


def performance(lake: Lake, model: str, since: datetime) -> list[Performance]:
    """Figures of every release of a model on every device that predicted since then.

    Args:
        lake: to ask.
        model: whose predictions.
        since: by the devices' clocks.

    Raises:
        UnknownStreamError: no device has predicted yet.
        StoreUnavailableError: the store did not answer.
    """
    where = {
        "source": identifier(PREDICTIONS_PREFIX + model),
        "since": f"make_timestamptz({round(since.timestamp() * 1e6)})",
    }
    shares: dict[tuple[int, str], dict[str, float]] = {}
    for row in lake.sql(_LABELS.format(**where)).to_pylist():
        shares.setdefault((row["release"], row["device"]), {})[row["label"] or ""] = row["windows"]
    found = []
    for row in lake.sql(_FIGURES.format(**where)).to_pylist():
        span_us = row["last_us"] - row["first_us"]
        labels = shares.get((row["release"], row["device"]), {})
        found.append(
            Performance(
                release=row["release"],
                device=row["device"],
                windows=row["windows"],
                first_us=row["first_us"],
                last_us=row["last_us"],
                rate_per_s=(row["windows"] - 1) / (span_us / 1e6) if span_us > 0 else 0.0,
                latency_ms_p50=row["p50"] or 0.0,
                latency_ms_p99=row["p99"] or 0.0,
                nan_share=row["nan_share"],
                score_mean=row["score_mean"],
                score_sd=row["score_sd"],
                labels={label: count / row["windows"] for label, count in labels.items()},
                compared=row["compared"],
                disagreements=row["disagreements"],
            )
        )
    return found


def latest_query(model: str, since: datetime, windows_max: int) -> str:
    """The latest rows of every release on every device, device by device, as `lake.monitoring.feed` has them."""
    return (
        "SELECT _device, release::BIGINT AS release, window_start, ts, score, label, latency_us, nan_count, features "
        f"FROM {identifier(PREDICTIONS_PREFIX + model)} WHERE ts >= make_timestamptz({round(since.timestamp() * 1e6)}) "
        f"QUALIFY row_number() OVER (PARTITION BY _device, release ORDER BY ts DESC) <= {windows_max} "
        "ORDER BY _device, release, ts"
    )
