"""What waits in a buffer, asked of the agent, or read from the file where none runs. Reading changes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from contract.errors import TemporaryError
from edge_agent.buffer.connection import BUSY_TIMEOUT_S
from edge_agent.buffer.ledger import load
from edge_agent.buffer.port import LaneInfo
from edge_agent.report import waiting
from edge_agent.status import AgentNotRunningError, fetch


class BufferUnreadableError(TemporaryError):
    """There is no buffer at this path, it may not be read, or it is damaged."""


def fetch_buffer(socket: Path, buffer: Path | None = None) -> list[dict[str, Any]]:
    """What waits, one entry for each (stream, epoch): stream, epoch, live, batches, rows, bytes, first_seq, last_seq,
    oldest_wall_us.

    Args:
        socket: the agent's status socket.
        buffer: its buffer, read where no agent answers; None leaves it at the socket.

    Raises:
        AgentNotRunningError: no agent answers, and no buffer was given.
        BufferUnreadableError: no agent answers, and the file cannot be read.
    """
    try:
        answer: list[dict[str, Any]] = fetch(socket, "buffer")
        return answer
    except AgentNotRunningError:
        if buffer is None:
            raise
    return waiting(read_buffer(buffer))


def read_buffer(path: Path) -> Sequence[LaneInfo]:
    """The lanes of a buffer's file. What was acknowledged shortly before the agent ended may still be counted.

    Raises:
        BufferUnreadableError: there is none, it may not be read, or it is damaged.
    """
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
        try:
            lanes = load(lambda sql, parameters: connection.execute(sql, parameters).fetchall())
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise BufferUnreadableError(
            f"buffer {path} cannot be read ({error}); give the path of the configuration, and run this as its owner"
        ) from error
    return sorted((lane.info() for lane in lanes.values() if lane.shown), key=lambda info: not info.live)
