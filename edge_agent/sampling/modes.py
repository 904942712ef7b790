"""The port of a sampling mode, and the mode of given settings."""

from __future__ import annotations

from typing import Protocol

import pyarrow as pa

from edge_agent.sampling.burst import BurstMode
from edge_agent.sampling.on_change import OnChangeMode
from edge_agent.sampling.settings import Burst, OnChange, Sampling
from edge_agent.sensors.port import Sample


class Mode(Protocol):
    """Which rows are kept. Pure: rows in, rows out, no clock.

    Attributes:
        held_rows: rows it holds back for now and may give later.
    """

    held_rows: int

    def feed(self, sample: Sample) -> list[Sample]:
        """The rows that are kept now, in order."""


class EveryRow:
    """Keeps every row: modes `interval` and `stream`."""

    held_rows = 0

    def feed(self, sample: Sample) -> list[Sample]:
        """The sample itself."""
        return [sample]


def build_mode(settings: Sampling, schema: pa.Schema) -> Mode:
    """The mode for a stream of this schema (`ts` in front).

    Raises:
        SensorConfigError: the settings name a field that the stream does not have, or of a type that does not suit.
    """
    if isinstance(settings, OnChange):
        return OnChangeMode(settings, schema)
    if isinstance(settings, Burst):
        return BurstMode(settings, schema)
    return EveryRow()
