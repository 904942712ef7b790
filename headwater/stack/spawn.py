"""Making one child process and watching for its end.

A child has its own session, so Ctrl-C in a terminal reaches only the stack, which then stops its children in order.
Its output is a pipe to the stack. It dies with the thread that made it (see `launch`), so it must be made by one that
lives as long as the stack.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from headwater.stack import launch

READ_BYTES_MAX = 65_536
LAST_WORDS_READS_MAX = 64
"""A grandchild that kept the pipe and writes without end must not keep the stack from noticing the child's end."""


class Child:
    """A running process, its output and its end. Used by one thread only.

    Raises:
        OSError: when the process cannot be made.
    """

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path | None, files_max: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(files_max), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=cwd,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.output_fd = self._process.stdout.fileno()
        os.set_blocking(self.output_fd, False)
        try:
            self.end_fd = os.pidfd_open(self.pid)
            """Readable when the process has ended."""
        except OSError:
            self.kill()
            self._process.wait()
            self._process.stdout.close()
            raise

    def read(self) -> bytes | None:
        """Output that is there now; empty when there is none, None when there never will be again."""
        try:
            return os.read(self.output_fd, READ_BYTES_MAX) or None
        except BlockingIOError:
            return b""

    def last_words(self) -> bytes:
        """What is left in the pipe of a process that has ended, within bounds."""
        words = []
        for _ in range(LAST_WORDS_READS_MAX):
            data = self.read()
            if not data:
                break
            words.append(data)
        return b"".join(words)

    def terminate(self) -> None:
        """Ask the process to stop."""
        try:
            # Not through `subprocess`, which would collect a process that has just ended, and its code with it.
            signal.pidfd_send_signal(self.end_fd, signal.SIGTERM)
        except ProcessLookupError:
            # It has ended already, which is what was asked for.
            return

    def kill(self) -> None:
        """End the process and everything it started that stayed in its group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            # Not even a zombie is left of the group; then there is nothing to end.
            return

    def reap(self) -> int | None:
        """The exit code once the process has ended, else None. What it left running in its group ends with it."""
        ended = os.waitid(os.P_PIDFD, self.end_fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        # Before the zombie is collected: until then its number cannot belong to anybody else.
        self.kill()
        return self._process.wait()

    def close(self) -> None:
        """Give back the pipe and the watch."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        os.close(self.end_fd)
