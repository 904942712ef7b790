"""`headwater simulate replay`: a file sent by a real agent, in this process, until the lake has all of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from contract.errors import ConfigurationError, HeadwaterError, TemporaryError
from edge_agent.app import run_agent
from edge_agent.sampling.status import State
from edge_agent.settings import parse_settings
from edge_agent.status import fetch_status
from headwater.exits import Exit
from headwater.file_check import FileRefused, check_file

LOOK_S = 0.2


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to replay, and as whom."""

    path: str
    device: str
    stream: str
    time_column: str
    fields: tuple[str, ...] = ()
    delimiter: str = ""
    decimal_point: str = "."
    time_format: str = ""
    speed: float = 1.0
    loop: bool = False
    keep_timestamps: bool = False
    broker: str
    folder: Path
    """Of the device's buffer and status socket."""


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a replay ended."""

    device: str
    stream: str
    rows_accepted: int
    """Readings that the buffer accepted in this run."""
    rows_waiting: int
    """Readings of the device that the lake has not acknowledged yet; the next replay sends them first."""
    rows_dropped: int
    """Readings that did not reach the buffer, for lack of room or because they break a rule."""


def replay_config(options: ReplayOptions) -> dict[str, Any]:
    """The configuration of the agent that replays."""
    return {
        "device": options.device,
        "broker": {"url": options.broker},
        "buffer": {"path": "buffer.db"},
        "uplink": {"reconnect_base_s": 0.2, "reconnect_max_s": 10.0},
        "status": {"socket": "agent.sock"},
        "log": {"level": "warning"},
        "streams": {
            options.stream: {
                "driver": "replay",
                "sampling": {"mode": "stream"},
                "max_batch_age_s": 1.0,
                "options": {
                    "path": str(Path(options.path).expanduser().absolute()),
                    "time_column": options.time_column,
                    "fields": list(options.fields),
                    # What a shell hands over for a tab that was typed as in most languages.
                    "delimiter": "\t" if options.delimiter == "\\t" else options.delimiter,
                    "decimal_point": options.decimal_point,
                    "time_format": options.time_format,
                    "speed": float(options.speed),
                    "loop": options.loop,
                    "keep_timestamps": options.keep_timestamps,
                },
            }
        },
    }


def run_replay(options: ReplayOptions) -> ReplayResult:
    """Replay a file to its end; from the main thread.

    Raises:
        FileRefused: the file is not as described.
        ConfigurationError: an option cannot be.
        TemporaryError: the agent died, or its disk refused.
    """
    config = replay_config(options)
    settings = parse_settings(config, source="headwater simulate replay", folder=options.folder)
    check_file(config["streams"][options.stream]["options"])
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{options.folder} cannot be made ({error}); choose another --data") from error
    watcher = _Watcher(Path(settings.status.socket), options.stream)
    thread = threading.Thread(target=watcher.run, name="replay-watcher", daemon=True)
    thread.start()
    try:
        code = run_agent(settings)
    finally:
        watcher.stop.set()
        thread.join()
    if watcher.failed:
        accepted = watcher.seen["accepted_rows"]
        raise FileRefused(
            f"{options.path} cannot be read further after {accepted:,} rows (the line above says why); mend the file, "
            "or describe it better with --fields, --time-format, --delimiter, --decimal-point"
        )
    if code != Exit.OK:
        raise TemporaryError(f"the agent of {options.device} ended with {code}; its log above says why")
    seen = watcher.seen
    return ReplayResult(
        device=options.device,
        stream=options.stream,
        rows_accepted=seen.get("accepted_rows", 0),
        rows_waiting=seen.get("waiting_rows", 0),
        rows_dropped=seen.get("dropped_rows", 0) + seen.get("refused_rows", 0) + seen.get("overruns", 0),
    )


class _Watcher:
    """Looks at the agent from beside; asks it to end when the file has ended and nothing waits.

    Attributes:
        seen: the last that the agent said of the stream.
        failed: whether the file cannot be replayed further; the agent has logged why.
    """

    def __init__(self, socket: Path, stream: str) -> None:
        self._socket, self._stream = socket, stream
        self.stop = threading.Event()
        self.seen: Mapping[str, Any] = {}
        self.failed = False

    def run(self) -> None:
        """Look until told to stop."""
        while not self.stop.wait(LOOK_S):
            try:
                self.seen = fetch_status(self._socket)["streams"][self._stream]
            except HeadwaterError:
                continue  # it is starting, or ending
            if self._is_done(self.seen):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _is_done(self, stream: Mapping[str, Any]) -> bool:
        if stream["state"] == State.FAILED:
            self.failed = True
            return True
        taken = stream["readings"] - stream["refused_rows"] - stream["suppressed_rows"] - stream["overruns"]
        stored = stream["accepted_rows"] + stream["dropped_rows"] >= taken
        return stream["state"] == State.EXHAUSTED and stored and not stream["waiting_batches"]
