"""What the lake can tell at once: a few questions worth asking of each kind of recording, in SQL."""

from __future__ import annotations

import msgspec

from headwater.plan import SYNTHETIC, WATCH


class Question(msgspec.Struct, frozen=True):
    """A question and its SQL."""

    title: str
    sql: str


VIGOUR = Question(
    "Which exercise was the most vigorous for each person? (rms of acceleration about its mean, g)",
    """
    WITH labelled AS (
        SELECT e.subject, e.exercise, w.ax, w.ay, w.az
        FROM watch w ASOF JOIN exercise e ON w._device = e._device AND w.ts >= e.ts
    ), measured AS (
        SELECT subject, exercise, count(*) AS readings,
               sqrt(var_pop(ax::DOUBLE) + var_pop(ay::DOUBLE) + var_pop(az::DOUBLE)) AS rms
        FROM labelled GROUP BY ALL
    )
    SELECT subject, arg_max(exercise, rms) AS most_vigorous, round(max(rms), 3) AS rms_g,
           arg_min(exercise, rms) AS calmest, round(min(rms), 3) AS calmest_rms_g, sum(readings)::BIGINT AS readings
    FROM measured GROUP BY subject ORDER BY subject
    """,
)
WRISTS = Question(
    "Which wrist turns faster, exercise by exercise? (rms of angular velocity, rad/s)",
    """
    WITH labelled AS (
        SELECT e.exercise, right(regexp_extract(w._device, '^watch-s[0-9]+-[lr]'), 1) AS side,
               (w.wx::DOUBLE) ** 2 + (w.wy::DOUBLE) ** 2 + (w.wz::DOUBLE) ** 2 AS turn
        FROM watch w ASOF JOIN exercise e ON w._device = e._device AND w.ts >= e.ts
    )
    SELECT exercise, round(sqrt(avg(turn) FILTER (side = 'l')), 2) AS "left",
           round(sqrt(avg(turn) FILTER (side = 'r')), 2) AS "right", count(*) AS readings
    FROM labelled GROUP BY exercise ORDER BY greatest("left", "right") DESC
    """,
)
STATES = Question(
    "What do the machines do all day, and how warm do they get?",
    """
    SELECT state, count(DISTINCT _device) AS machines, count(*) AS readings,
           round(avg(temperature), 2) AS mean_temperature, round(max(temperature), 2) AS highest,
           round(stddev_pop(vibration), 3) AS vibration_rms
    FROM machine GROUP BY state ORDER BY readings DESC
    """,
)
PARTS = Question(
    "How many parts did each machine make?",
    """
    SELECT _device AS machine, max(parts) - min(parts) AS parts, round(avg(pressure), 2) AS mean_pressure,
           min(ts) AS since
    FROM machine GROUP BY ALL ORDER BY machine
    """,
)


def regularity(stream: str) -> Question:
    """How evenly each device was sampled."""
    return Question(
        "How evenly was each device sampled? (time between readings, ms)",
        f"""
        WITH steps AS (
            SELECT _device, ts, epoch_us(ts) - lag(epoch_us(ts)) OVER (PARTITION BY _device ORDER BY ts) AS step_us
            FROM {quoted(stream)}
        )
        SELECT _device AS device, count(*) AS readings, round(median(step_us) / 1000, 3) AS median,
               round(quantile_cont(step_us, 0.99) / 1000, 3) AS p99, round(max(step_us) / 1000, 1) AS longest,
               count(*) FILTER (step_us <= 0) AS not_rising
        FROM steps GROUP BY ALL ORDER BY device
        """,
    )


def delays(stream: str) -> Question:
    """How old readings were when they arrived."""
    return Question(
        "How old were readings when they reached the gateway? (seconds)",
        f"""
        SELECT _device AS device, count(DISTINCT (_epoch, _seq)) AS batches,
               round(median(epoch_us(_received_at) - epoch_us(ts)) / 1e6, 3) AS median,
               round(max(epoch_us(_received_at) - epoch_us(ts)) / 1e6, 3) AS oldest
        FROM {quoted(stream)} GROUP BY ALL ORDER BY device
        """,
    )


def per_day(stream: str) -> Question:
    """What there is of each day."""
    return Question(
        "What is there of each day?",
        f"""
        SELECT ts::DATE AS day, count(*) AS readings, count(DISTINCT _device) AS devices, min(ts) AS first,
               max(ts) AS last
        FROM {quoted(stream)} GROUP BY ALL ORDER BY day
        """,
    )


def questions(recordings: str, stream: str) -> tuple[Question, Question, Question]:
    """Three questions for a kind of recording.

    Args:
        recordings: `watch`, `synthetic`, or a file.
        stream: the stream that a file is replayed into.
    """
    if recordings == WATCH:
        return VIGOUR, WRISTS, regularity("watch")
    if recordings == SYNTHETIC:
        return STATES, PARTS, regularity("machine")
    return per_day(stream), regularity(stream), delays(stream)


def quoted(name: str) -> str:
    """A name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'
