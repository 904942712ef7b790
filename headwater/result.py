"""What a demo found: the object that `headwater demo --json` ends with."""

from __future__ import annotations

from typing import Any

import msgspec


class AckMs(msgspec.Struct, frozen=True):
    """Time from the first sending of a batch to its acknowledgement, milliseconds: quantiles of a histogram."""

    p50: float | None
    p99: float | None


class StreamResult(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of one device."""

    device: str
    stream: str
    rows_accepted: int
    rows_in_lake: int
    distinct: int
    lost: int
    duplicated: int
    gaps: int
    waiting: int


class Answer(msgspec.Struct, frozen=True):
    """A question, and what the lake says."""

    question: str
    rows: list[dict[str, Any]]


class ModelResult(msgspec.Struct, frozen=True, kw_only=True):
    """A release that was trained, signed and rolled out during the demo."""

    name: str
    version: int
    rollout: str
    """How its rollout ended."""
    devices: int
    """Devices whose predictions by it are in the lake."""
    windows: int
    """Of these predictions, those whose true label is known."""
    accuracy: float | None
    """Share of them that are right; None where nothing is known."""


class DriftResult(msgspec.Struct, frozen=True, kw_only=True):
    """The device whose sensor was turned."""

    device: str
    detected_after_s: float | None
    """From the turn to the alert; None where none came."""
    retrained: bool
    """Whether a release was learned from it and approved."""
    alert: str
    accuracy: dict[str, float | None]
    """By version: on this device, from its turn on."""


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The reconciliation of one run. The names are a contract."""

    ok: bool
    """All that was to be shown was shown."""
    exactly_once: bool
    """Nothing lost, doubled, changed, quarantined or still waiting."""
    rows_accepted: int
    """Readings that the devices' buffers accepted."""
    rows_in_lake: int
    distinct: int
    lost: int
    duplicated: int
    gaps: int
    """Batches missing between others, as the lake's own view counts them."""
    quarantined: int
    waiting: int
    """Readings that were still in buffers when the devices' time to send was over."""
    rows_compared: int
    rows_changed: int
    """Readings whose bits in the lake are not those of the recording."""
    breaks: int
    """Places where a recording jumps in the lake although no agent was started anew."""
    exact: bool
    """Whether the count of accepted readings is proved complete by the buffers' numbering; false where an agent was
    killed, whose last count nobody saw."""
    seconds: float
    """How long devices measured."""
    readings_per_s: float
    ack_ms: AckMs
    wire_bytes_per_reading: float
    """MQTT payloads of all streams, repeats among them, over all readings accepted."""
    overruns: int
    """Readings that devices were too busy to take: they never reached a buffer."""
    agent_resident_bytes_max: int
    restarts: dict[str, int]
    streams: list[StreamResult]
    answers: list[Answer]
    models: list[ModelResult] = []
    """Empty with --no-models."""
    drift: DriftResult | None = None
    models_trouble: str = ""
    """Why the way of models did not come to its end; empty when it did, or was left out."""

    @property
    def complaints(self) -> list[str]:
        """What did not go as it should."""
        found = [] if self.exactly_once else ["not every reading is in the lake exactly once; see the reconciliation"]
        return [*found, *([f"the models did not get there: {self.models_trouble}"] if self.models_trouble else [])]
