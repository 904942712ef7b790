"""Stacks of one user choose their ports one after the other.

A port that was free when it was chosen may be taken before its server binds it. Between two stacks that start at the
same moment that is likely, for both want the usual ports; and the later one's devices would talk to the earlier one's
broker. So each chooses and binds while it holds a lock of the whole machine.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contract.errors import TemporaryError

TIMEOUT_S = 120.0
LOOK_S = 0.1


class TurnNotCome(TemporaryError):
    """Another stack has been starting for too long."""


@contextmanager
def turn(path: Path | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Hold the lock; the kernel gives it back however this process ends.

    Args:
        path: the lock; None takes the one of this user.
        timeout_s: how long to wait for it.

    Raises:
        TurnNotCome: others held it all the time.
    """
    path = path or lock_path()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _acquire(handle, path, timeout_s)
        yield
    finally:
        os.close(handle)


def lock_path(runtime_folders: Path = Path("/run/user")) -> Path:
    """The lock of this user: in the user's runtime folder, else in that of temporary files.

    Not by XDG_RUNTIME_DIR: two stacks of one user, of which a service manager started one, must find the same file. It
    is never removed: who holds a file that is gone holds nobody up.
    """
    name, folder = f"headwater-{os.getuid()}.lock", runtime_folders / str(os.getuid())
    return (folder if os.access(folder, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())) / name


def _acquire(handle: int, path: Path, timeout_s: float) -> None:
    deadline_s, pause = time.monotonic() + timeout_s, threading.Event()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                raise TurnNotCome(
                    f"another stack has been starting for {timeout_s:.0f} s (it holds {path}); see to it, and try again"
                ) from None
            pause.wait(LOOK_S)
        else:
            return
