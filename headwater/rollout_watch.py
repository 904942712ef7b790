"""How a rollout is doing, for people: from a gateway, which knows the devices, or from the lake alone."""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from contract.errors import ConfigurationError, TemporaryError
from headwater import output
from headwater.place import data_folder, read_record
from headwater.signals import stopping
from lake.rollouts import ENDED

ANSWER_BYTES_MAX = 16 * 1024 * 1024
TIMEOUT_S = 10.0
LOOK_S = 1.0
"""Between two looks of `--watch`."""
COLUMNS = ("rollout", "version", "state", "stage", "devices", "since", "by", "reason")


def find_gateway(url: str | None, lake: str | None, data: str | None) -> str | None:
    """The gateway to ask: `--url`, else that of the data folder's stack; None where a lake was named, or there is none.

    Raises:
        ConfigurationError: the URL is none.
    """
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"--url {url!r} is no web address; write http://127.0.0.1:8080")
        return url
    record = None if lake else read_record(data_folder(data, os.environ))
    return None if record is None else record.http


def asked(url: str, path: str) -> Any:
    """What a gateway answers.

    Raises:
        TemporaryError: it did not answer.
        ConfigurationError: it refused; with its remedy.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        response = connection.getresponse()
        content = msgspec.json.decode(response.read(ANSWER_BYTES_MAX))
    except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
        raise TemporaryError(f"the gateway at {url} did not answer ({error}); is it running? Or use --lake") from error
    finally:
        connection.close()
    if response.status != 200:
        said = content.get("error", {}) if isinstance(content, Mapping) else {}
        raise ConfigurationError(f"{said.get('message', path)}; {said.get('remedy', 'look at its log')}")
    return content


def rollouts_of(url: str) -> list[dict[str, Any]]:
    """All rollouts, newest first; those under way with their devices."""
    found: list[dict[str, Any]] = asked(url, "/v1/rollouts")["rollouts"]
    return [each if each["state"] in ENDED else rollout_of(url, each["rollout"]) for each in found]


def rollout_of(url: str, name: str) -> dict[str, Any]:
    """One rollout, with its devices."""
    found: dict[str, Any] = asked(url, f"/v1/rollouts/{quote(name, safe='')}")
    return found


def say_rollouts(found: list[dict[str, Any]]) -> None:
    """A table for people."""
    output.say_table(COLUMNS, [row(each) for each in found], separators=False)


def row(rollout: Mapping[str, Any]) -> list[Any]:
    """One rollout as a row of `COLUMNS`."""
    stages = rollout["stages"]
    stage = f"{rollout['stage']}/{len(stages)}" + (f" ({stages[rollout['stage'] - 1]})" if rollout["stage"] else "")
    waits = rollout.get("waits_for")
    return [
        rollout["rollout"],
        rollout["version"],
        rollout["state"],
        stage,
        counts(rollout),
        rollout["since"],
        rollout["by"],
        f"waits: {waits}" if waits else rollout["reason"],
    ]


def counts(rollout: Mapping[str, Any]) -> str:
    """Its devices in words."""
    devices = dict(rollout.get("devices") or {})
    members = devices.pop("members", None)
    if members is None:
        return ""
    parts = [f"{number} {name.replace('_', ' ')}" for name, number in devices.items() if number]
    return f"{members}: {', '.join(parts) or '-'}"


def watch(look: Callable[[], dict[str, Any]], *, json: bool) -> bool:
    """Show a rollout until it has ended, or Ctrl-C; whether it did not end otherwise than in success.

    Args:
        look: how it is now.
        json: one line each time that something changed, instead of a view that is drawn anew.
    """
    shown: dict[str, Any] | None = None
    with stopping() as stop:
        while True:
            found = look()
            if found != shown:
                shown = found
                if json:
                    output.say_json(found)
                else:
                    output.say(line(found))
            if found["state"] in ENDED:
                return bool(found["state"] == "succeeded")
            if stop.wait(LOOK_S):
                return True


def line(rollout: Mapping[str, Any]) -> str:
    """A rollout in one line, with a bar of its devices."""
    devices = rollout.get("devices") or {}
    members, committed = devices.get("members", 0), devices.get("committed", 0)
    filled = round(20 * committed / members) if members else 0
    bar = f"[{'#' * filled}{'.' * (20 - filled)}] " if devices else ""
    stages = rollout["stages"]
    stage = f"stage {rollout['stage']}/{len(stages)}"
    waits = rollout.get("waits_for") or rollout["reason"]
    return f"{rollout['state']:<11} {stage}  {bar}{counts(rollout)}  {waits}"
