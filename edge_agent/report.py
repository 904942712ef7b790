"""What the agent says of itself: the `Reported` document for the fleet, the answers of the status socket. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from contract.messages import Refusal, Reported, ReportedStream
from contract.models import ReportedModel
from edge_agent.buffer.port import LaneInfo
from edge_agent.remote_config import InForce
from edge_agent.sampling.status import SamplingStatus


class StreamCondition(NamedTuple):
    """What is known of one stream at one moment."""

    in_force: InForce
    sampling: SamplingStatus
    accepted_rows: int
    """Rows that the buffer accepted since the agent started."""
    evicted_rows: int
    """Rows that the buffer gave up since the agent started."""
    dropped_rows: int
    """Rows lost between sampler and buffer, because the disk refused too long."""
    lanes: Sequence[LaneInfo]


class Condition(NamedTuple):
    """What is known of the agent at one moment."""

    agent: str
    boot: str
    started_at_us: int
    clock_synced: bool
    revision: int
    refused: Refusal | None
    streams: Mapping[str, StreamCondition]
    models: Mapping[str, ReportedModel] = {}
    tags: tuple[str, ...] = ()


def reported(condition: Condition) -> Reported:
    """The document for `hw/v1/reported/<device>`."""
    return Reported(
        revision=condition.revision,
        refused=condition.refused,
        agent=condition.agent,
        boot=condition.boot,
        clock_synced=condition.clock_synced,
        started_at_us=condition.started_at_us,
        streams={name: _stream(stream) for name, stream in condition.streams.items()},
        models=dict(condition.models),
        tags=condition.tags,
    )


def settled_part(document: Reported) -> Any:
    """What of a document is worth publishing at once when it changes: all but the counters, which always do."""
    streams = {
        name: (each.enabled, each.rate_hz, each.max_batch_rows, each.max_batch_age_s)
        for name, each in document.streams.items()
    }
    models = {name: (each.active, each.active_sha256, _settled_order(each)) for name, each in document.models.items()}
    return document.revision, document.refused, document.clock_synced, streams, models


def waiting(lanes: Sequence[LaneInfo]) -> list[dict[str, Any]]:
    """What is in the buffer, one entry for each (stream, epoch), for `headwater agent buffer`."""
    return [
        {
            "stream": lane.stream,
            "epoch": lane.epoch,
            "live": lane.live,
            "batches": lane.batches,
            "rows": lane.rows,
            "bytes": lane.body_bytes,
            "first_seq": lane.floor,
            "last_seq": lane.last_seq,
            "oldest_wall_us": lane.oldest_wall_us,
        }
        for lane in lanes
    ]


def stream_status(stream: StreamCondition) -> dict[str, Any]:
    """One stream, for `headwater agent status`."""
    document: dict[str, Any] = msgspec.to_builtins(_stream(stream))
    sampling = stream.sampling
    return document | {
        "state": sampling.state.value,
        "last_error": sampling.last_error,
        "accepted_rows": stream.accepted_rows,
        "dropped_rows": stream.dropped_rows,
        "refused_rows": sampling.rows_refused,
        "suppressed_rows": sampling.rows_suppressed,
    }


def _settled_order(model: ReportedModel) -> Any:
    order = model.order
    return None if order is None else (order.sequence, order.state, order.reason)


def _stream(stream: StreamCondition) -> ReportedStream:
    in_force, sampling = stream.in_force, stream.sampling
    return ReportedStream(
        enabled=in_force.enabled,
        rate_hz=in_force.rate_hz,
        max_batch_rows=in_force.max_batch_rows,
        max_batch_age_s=in_force.max_batch_age_s,
        readings=sampling.rows_read,
        overruns=sampling.overruns,
        waiting_batches=sum(lane.batches for lane in stream.lanes),
        waiting_rows=sum(lane.rows for lane in stream.lanes),
        waiting_bytes=sum(lane.body_bytes for lane in stream.lanes),
        evicted_rows=stream.evicted_rows,
    )
