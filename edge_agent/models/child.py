"""`python -m edge_agent.models.child open|verify|probe`: what must not happen in the agent itself happens in here.

A short-lived process: one JSON document on stdin, one on stdout, then it ends. Its address space, CPU time, files and
life are limited before it reads a byte of what others wrote. `open` and `verify` take TUF and the network (28 MB),
`probe` takes whatever a model wants. The agent's side is `edge_agent.models.parent`.
"""

from __future__ import annotations

import hashlib
import resource
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from contract.errors import ConfigurationError, HeadwaterError
from contract.models import Assignment, Manifest
from edge_agent.models.orders import Distrusted, NotYetTrusted, Seen, TrustPlace

REQUEST_BYTES_MAX = 4 * 1024 * 1024
FILE_BYTES_MAX = 16 * 1024 * 1024
VERIFY_MEMORY_BYTES = 768 * 1024 * 1024
"""Of address space, most of which is never touched."""


class OpenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Orders as they arrived."""

    envelopes: tuple[dict[str, Any], ...]
    place: TrustPlace
    device: str
    seen: dict[str, Seen]
    synchronised: bool
    deadline_s: float


class ProbeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A model to be tried."""

    model: str
    """Path of the ONNX file."""
    manifest: Manifest
    known: str
    """Path of the probe artifact; empty for none."""
    deadline_s: float


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an order."""

    assignment: Assignment | None = None
    """Of an order that was not opened: what it claims, unproven; None where it claims nothing."""
    key: str = ""
    manifest: Manifest | None = None
    reason: str = ""
    """A `TrustReason`; empty when it was opened."""
    message: str = ""
    final: bool = True


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child says."""

    opened: tuple[Opened, ...] = ()
    probed: dict[str, float] | None = None
    error: str = ""
    """Why there is none of it: of a model, why it failed; else a setting that is wrong."""


def main() -> int:
    """Do what the command line and stdin ask for; 0 when there is an answer on stdout."""
    command = sys.argv[1] if len(sys.argv) == 2 else ""
    work = {"open": _open, "verify": _verify, "probe": _probe}.get(command)
    if work is None:
        sys.stderr.write("usage: python -m edge_agent.models.child open|verify|probe\n")
        return 2
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES_MAX, FILE_BYTES_MAX))
    _be_the_first_to_die()
    request = sys.stdin.buffer.read(REQUEST_BYTES_MAX)
    try:
        answer = work(request)
    except HeadwaterError as error:
        answer = Answer(error=str(error))
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    sys.stdout.buffer.flush()
    return 0


def _open(data: bytes) -> Answer:
    from edge_agent.models.trust import open_assignment

    request = msgspec.json.decode(data, type=OpenRequest)
    _limit(request.deadline_s, VERIFY_MEMORY_BYTES)

    def opened(envelope: dict[str, Any]) -> Opened:
        order = open_assignment(
            envelope,
            request.place,
            device=request.device,
            seen=request.seen,
            now=datetime.now(UTC),
            synchronised=request.synchronised,
        )
        return Opened(assignment=order.assignment, key=order.key)

    return Answer(opened=tuple(_judged(envelope, opened) for envelope in request.envelopes))


def _verify(data: bytes) -> Answer:
    from edge_agent.models.trust import verify_order

    request = msgspec.json.decode(data, type=OpenRequest)
    _limit(request.deadline_s, VERIFY_MEMORY_BYTES)

    def verified(envelope: dict[str, Any]) -> Opened:
        order, manifest = verify_order(
            envelope,
            request.place,
            device=request.device,
            seen=request.seen,
            now=datetime.now(UTC),
            synchronised=request.synchronised,
        )
        return Opened(assignment=order.assignment, key=order.key, manifest=manifest)

    return Answer(opened=tuple(_judged(envelope, verified) for envelope in request.envelopes))


def _probe(data: bytes) -> Answer:
    from edge_agent.models.probe import probe

    request = msgspec.json.decode(data, type=ProbeRequest)
    # What is loaded by now is the runtime; the rest is the model's.
    _limit(request.deadline_s, _address_space() + request.manifest.limits.memory_bytes_max)
    model = Path(request.model).read_bytes()
    if hashlib.sha256(model).hexdigest() != request.manifest.artifact.sha256:
        return Answer(error="the model's file was changed on disk before it was tried; order it again")
    known = Path(request.known).read_bytes() if request.known else None
    try:
        return Answer(probed=msgspec.to_builtins(probe(model, request.manifest, known)))
    except MemoryError:
        return Answer(error=_too_big(request.manifest))
    except HeadwaterError as error:
        if "allocat" in str(error) or "bad_alloc" in str(error):
            return Answer(error=_too_big(request.manifest))
        raise


def _too_big(manifest: Manifest) -> str:
    limit = manifest.limits.memory_bytes_max
    return f"it wants more memory than memory_bytes_max = {limit}; train a smaller model"


def _judged(envelope: dict[str, Any], work: Callable[[dict[str, Any]], Opened]) -> Opened:
    try:
        return work(envelope)
    except Distrusted as error:
        return Opened(assignment=_claimed(envelope), reason=error.reason.value, message=str(error))
    except NotYetTrusted as error:
        return Opened(assignment=_claimed(envelope), reason=error.reason.value, message=str(error), final=False)
    except ConfigurationError as error:
        return Opened(assignment=_claimed(envelope), reason="configuration", message=str(error), final=False)


def _claimed(envelope: dict[str, Any]) -> Assignment | None:
    """What an order that is not trusted says, to be shown to people."""
    import base64
    import binascii

    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        return msgspec.json.decode(payload, type=Assignment)
    except (KeyError, TypeError, ValueError, binascii.Error, msgspec.MsgspecError, RecursionError):
        return None


def _limit(deadline_s: float, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    cpu_s = max(1, round(deadline_s))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    # Also where the parent has died and nobody waits any more: the alarm's default action ends the process.
    signal.setitimer(signal.ITIMER_REAL, deadline_s + 1)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _be_the_first_to_die() -> None:
    """Where the device runs out of memory, the kernel shall take this process, not the agent."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass  # a kernel without it, or /proc read-only: the limits below hold all the same


if __name__ == "__main__":
    sys.exit(main())
