"""A one-machine stack that runs: the processes between its broker and its store."""

from __future__ import annotations

import http.client
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from contract.errors import HeadwaterError
from edge_agent.status import fetch
from headwater.checks.findings import Finding, failed, ok, warning
from headwater.place import DevicePlace, StackRecord

TIMEOUT_S = 3.0
ANSWER_BYTES_MAX = 64 * 1024
SILENT_MAX = 3
"""So many devices that do not answer, and the others are not asked: each may take TIMEOUT_S."""
_FAILED = "failed"
"""`edge_agent.sampling.status.State.FAILED`, as the status socket says it."""


class _Reason(msgspec.Struct):
    message: str = ""


class _Readiness(msgspec.Struct):
    """What /readyz answers."""

    reasons: list[_Reason] = []


def check_stack(record: StackRecord) -> list[Finding]:
    """The gateway and the devices of a stack that runs."""
    return [check_gateway(record.http, f"{record.logs}/gateway.log"), check_devices(record.devices, record.logs)]


def check_gateway(url: str, log: str) -> Finding:
    """Whether a gateway says that it is ready.

    Args:
        url: its HTTP address.
        log: where it tells more.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        remedy = f"see why: {log}; devices keep what they measure until it answers"
        return failed("stack.gateway", f"{url} does not answer: {str(error) or repr(error)}", remedy)
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return ok("stack.gateway", f"{url} is ready")
    try:
        reasons = [reason.message for reason in msgspec.json.decode(body, type=_Readiness).reasons]
    except msgspec.MsgspecError:
        reasons = []
    why = "; ".join(reasons) or f"it answers {answer.status}"
    return failed("stack.gateway", f"{url} is not ready: {why}", f"mend what it waits for; it tells more in {log}")


def check_devices(devices: Iterable[DevicePlace], logs: str) -> Finding:
    """Whether devices answer, measure, and are connected.

    Args:
        devices: those of the stack.
        logs: folder of their logs.
    """
    silent: list[str] = []
    stuck: list[str] = []
    apart: list[str] = []
    count = asked = 0
    for device in devices:
        count += 1
        if len(silent) == SILENT_MAX:
            continue
        asked += 1
        try:
            status = fetch(Path(device.socket), "status", timeout_s=TIMEOUT_S)
        except HeadwaterError:
            silent.append(device.name)
            continue
        streams = status["streams"].items()
        stuck += [f"{device.name} {name}: {one['last_error']}" for name, one in streams if one["state"] == _FAILED]
        if not status["uplink"]["connected"]:
            apart.append(device.name)
    more = "" if asked == count else f"; {count - asked} more were not asked"
    if silent:
        detail = f"no answer from {', '.join(silent)}{more}"
        return failed("stack.devices", detail, f"see why: {logs}/{silent[0]}.log")
    if stuck:
        others = f"; and {len(stuck) - 1} more" if len(stuck) > 1 else ""
        return failed("stack.devices", f"{stuck[0]}{others}", "mend what the devices replay, and start the stack again")
    if apart:
        detail = f"{len(apart)} of {count} are not connected to the broker: {', '.join(apart[:SILENT_MAX])}"
        return warning("stack.devices", detail, f"they keep what they measure; see why: {logs}/{apart[0]}.log")
    return ok("stack.devices", f"all {count} answer, measure and are connected")
