"""The agent's side of `edge_agent.models.child`: starts it, bounds its time and what it says, kills it by its id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TypeVar

import msgspec

from contract.errors import HeadwaterError, TemporaryError
from edge_agent.models.child import Answer, Opened, OpenRequest, ProbeRequest

ANSWER_BYTES_MAX = 4 * 1024 * 1024
STDERR_BYTES_MAX = 4_096
POLL_S = 0.05
_INHERITED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONHASHSEED",
    "VIRTUAL_ENV",
)
"""What a child gets of the environment; the broker's password is not among it."""

Request = TypeVar("Request", OpenRequest, ProbeRequest)


class ChildFailedError(HeadwaterError):
    """The child ended without an answer: it crashed, hung, or was killed by a limit. Says which."""


class NoChildError(ChildFailedError, TemporaryError):
    """No child could be started: the device has too little memory or too many processes at the moment."""


class CancelledError(TemporaryError):
    """Nobody wants the answer any more."""


def open_orders(request: OpenRequest, cancel: threading.Event) -> tuple[Opened, ...]:
    """Open orders as they arrived; one answer for each.

    Raises:
        ChildFailedError: see there.
        CancelledError: `cancel` was set.
    """
    return _opened("open", request, cancel)


def verify_orders(request: OpenRequest, cancel: threading.Event) -> tuple[Opened, ...]:
    """Open orders with the newest keys, and read the manifests of their releases.

    Raises:
        ChildFailedError: see there.
        CancelledError: `cancel` was set.
    """
    return _opened("verify", request, cancel)


def probe_model(request: ProbeRequest, cancel: threading.Event) -> str:
    """Try a model; why it failed, empty when it did not.

    Raises:
        NoChildError: it was not tried.
        CancelledError: `cancel` was set.
    """
    try:
        return _ask("probe", request, cancel).error
    except NoChildError:
        raise
    except ChildFailedError as error:
        return str(error)


def _opened(command: str, request: OpenRequest, cancel: threading.Event) -> tuple[Opened, ...]:
    answer = _ask(command, request, cancel)
    if answer.error or len(answer.opened) != len(request.envelopes):
        raise ChildFailedError(answer.error or "the verifying process left an order out")
    return answer.opened


def _ask(command: str, request: Request, cancel: threading.Event) -> Answer:
    """Run a child to its end, or to the request's."""
    handles: list[int] = []
    try:
        handles.extend(os.memfd_create(f"models-{name}") for name in ("in", "out", "err"))
        stdin, stdout, stderr = handles
        _write_all(stdin, msgspec.json.encode(request))
        os.lseek(stdin, 0, os.SEEK_SET)
        child = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.models.child", command],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=_environment(),
        )
        try:
            _wait(child, request.deadline_s, cancel)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        if child.returncode:
            raise ChildFailedError(_end_of(child.returncode, _read(stderr, STDERR_BYTES_MAX)))
        try:
            return msgspec.json.decode(_read(stdout, ANSWER_BYTES_MAX), type=Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ChildFailedError(f"the process that should {command} said nothing that can be read") from error
    except OSError as error:
        raise NoChildError(f"no process could be started to {command} ({error}); free memory") from error
    finally:
        for handle in handles:
            os.close(handle)


def _wait(child: subprocess.Popen[bytes], deadline_s: float, cancel: threading.Event) -> None:
    ends_s = time.monotonic() + deadline_s
    while child.poll() is None:
        if cancel.wait(POLL_S):
            raise CancelledError("it was not wanted any more")
        if time.monotonic() > ends_s:
            raise ChildFailedError(f"it hung: it had not ended after {deadline_s:g} s")


def _end_of(code: int, said: bytes) -> str:
    last = said.decode(errors="replace").strip().rpartition("\n")[2][:300]
    if code >= 0:
        return f"it ended with code {code}{': ' + last if last else ''}"
    number = -code
    if number in (signal.SIGXCPU, signal.SIGALRM):
        return f"it hung: it was ended by {signal.Signals(number).name}"
    if "bad_alloc" in last or "MemoryError" in last:
        return f"it wanted more memory than it may have: {last}"
    name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
    return f"it crashed: ended by {name}{': ' + last if last else ''}"


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _read(handle: int, bytes_max: int) -> bytes:
    """The last of what was written, if it is more."""
    size = os.fstat(handle).st_size
    return os.pread(handle, bytes_max, max(0, size - bytes_max))
