"""Where `headwater` begins. Nothing is imported before Ctrl-C is heard: on a small device importing takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_INTERRUPTED = 130
"""`headwater.exits.Exit.INTERRUPTED`, which may not be imported yet when it is needed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and end the process with its exit status."""
    try:
        from headwater.commands.tree import run

        run(arguments)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def console() -> None:
    """`main` as a process of its own: what it has to say is out, and then the process ends at once.

    Taking the interpreter apart is left out. Arrow's threads may still hold deltalake's Python file system then, which
    aborts a process that has done all it should with status 134.
    """
    try:
        main()
        status: object = 0
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        sys.stderr.write(f"{status}\n")
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 1  # whoever was to read it has gone
    os._exit(status if isinstance(status, int) else 0)
