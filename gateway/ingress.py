"""From a message to a batch on its way to the lake, or to quarantine. Runs in the network thread.

Whatever bytes arrive, `receive` returns: nothing that a device sends may stop the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import pyarrow as pa
import structlog

from contract.codec import Sealed, decode_body, unseal
from contract.errors import Reason, Rejected
from contract.limits import Limits
from contract.topics import UpTopic, parse_up
from gateway.budget import OVERHEAD_BYTES, MemoryBudget, unpacked_bytes
from gateway.metrics import GatewayMetrics
from gateway.ports import Lane, Pending
from lake.quarantine import QuarantineRecord

_log = structlog.get_logger()

INTERNAL_FAULT = "internal_fault"
"""Reason in quarantine of a payload that tripped over a bug of ours. Not one of `Reason`: the device did no wrong."""
_FAULTS_LOGGED_MAX = 100


def wall_us() -> int:
    """Wall clock, microseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000


class Deliver(Protocol):
    """Takes a batch on its way; it holds `pending.held_bytes` of the budget from then on. Must not wait."""

    def __call__(self, stream: str, pending: Pending) -> None:
        """One batch of a stream."""


class Ingress:
    """Reads messages.

    Args:
        limits: what one payload may be.
        budget: memory for what is on its way.
        deliver: takes batches.
        quarantine: takes payloads that must not be stepped over, with their reason. Must not wait.
        metrics: counters.
        clock_us: wall clock, microseconds.
        monotonic_s: for the budget's memory of shedding.
    """

    def __init__(
        self,
        *,
        limits: Limits,
        budget: MemoryBudget,
        deliver: Deliver,
        quarantine: Callable[[QuarantineRecord], None],
        metrics: GatewayMetrics,
        clock_us: Callable[[], int] = wall_us,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._budget = limits, budget
        self._deliver, self._quarantine, self._metrics = deliver, quarantine, metrics
        self._clock_us, self._monotonic_s = clock_us, monotonic_s
        self._shed = metrics.shed.labels("memory")
        self._logged: set[tuple[type[BaseException], int]] = set()

    def receive(self, topic: str, payload: bytes) -> None:
        """Take one message. Never raises."""
        self._metrics.received_messages.inc()
        self._metrics.received_bytes.inc(len(payload))
        received_at_us = self._clock_us()
        try:
            self._read(topic, payload, received_at_us)
        except Rejected as refusal:
            self._refuse(topic, payload, received_at_us, str(refusal.reason), str(refusal))
        except Exception as error:  # noqa: BLE001 - a bug that one payload finds must not stop all devices
            self._stumble(topic, payload, received_at_us, error)

    def _read(self, topic: str, payload: bytes, received_at_us: int) -> None:
        parsed = parse_up(topic)
        packed = len(payload) + OVERHEAD_BYTES
        if not self._budget.take(packed):
            self._drop()
            return
        held = packed
        try:
            sealed = unseal(payload)
            _check_topic(parsed, sealed)
            unpacked = unpacked_bytes(sealed.body, self._limits)
            if not self._budget.take(unpacked):
                self._drop()
                return
            held += unpacked
            content = self._decode(sealed)
            if isinstance(content, Rejected):
                self._budget.give_back(unpacked)
                held = packed
            pending = _pending(parsed, topic, payload, sealed, content, received_at_us, held)
            held = 0  # from here on it is the batch's
        finally:
            self._budget.give_back(held)
        self._deliver(parsed.stream, pending)

    def _decode(self, sealed: Sealed) -> pa.RecordBatch | Rejected:
        try:
            batch = decode_body(sealed.body, sealed.envelope, self._limits)
        except Rejected as refusal:
            self._metrics.refused.labels(str(refusal.reason)).inc()
            return refusal.with_traceback(None)  # it is kept until the commit, and would keep frames and views alive
        self._metrics.received_batches.inc()
        self._metrics.received_rows.inc(batch.num_rows)
        return batch

    def _drop(self) -> None:
        """No memory: say nothing, so that the device waits, and sends again later."""
        self._budget.shed(self._monotonic_s())
        self._shed.inc()

    def _refuse(self, topic: str, payload: bytes, received_at_us: int, reason: str, message: str) -> None:
        self._metrics.refused.labels(reason).inc()
        try:
            parsed: UpTopic | None = parse_up(topic)
        except Rejected:
            parsed = None
        self._quarantine(
            QuarantineRecord(
                received_at_us=received_at_us,
                topic=topic,
                reason=reason,
                message=message,
                device=parsed.device if parsed else None,
                stream=parsed.stream if parsed else None,
                epoch=None,
                seq=None,
                payload=payload,
            )
        )

    def _stumble(self, topic: str, payload: bytes, received_at_us: int, error: Exception) -> None:
        self._metrics.faults.labels("ingress").inc()
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        place = (type(error), at.tb_lineno if at else 0)
        if place not in self._logged and len(self._logged) < _FAULTS_LOGGED_MAX:
            self._logged.add(place)
            _log.error("ingress_fault", topic=topic[:200], payload_bytes=len(payload), exc_info=error)
        self._refuse(topic, payload, received_at_us, INTERNAL_FAULT, f"{type(error).__name__}: {str(error)[:200]}")


def _check_topic(topic: UpTopic, sealed: Sealed) -> None:
    """A broker checks who may publish where; the envelope must not say otherwise."""
    envelope = sealed.envelope
    if (envelope.device, envelope.stream) != (topic.device, topic.stream):
        raise Rejected(
            Reason.TOPIC_MISMATCH,
            f"the envelope says device {envelope.device!r}, stream {envelope.stream!r}, the topic says "
            f"{topic.device!r}, {topic.stream!r}; publish each batch on its own topic",
        )


def _pending(
    topic: UpTopic,
    text: str,
    payload: bytes,
    sealed: Sealed,
    content: pa.RecordBatch | Rejected,
    received_at_us: int,
    held_bytes: int,
) -> Pending:
    envelope = sealed.envelope
    return Pending(
        Lane(topic.device, envelope.epoch),
        envelope.seq,
        envelope.floor,
        topic.shard,
        received_at_us,
        envelope.clock,
        content,
        text,
        payload,
        envelope.sent_at_us,
        held_bytes,
    )
