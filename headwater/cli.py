"""Where `headwater` begins. Nothing is imported before Ctrl-C is heard: on a small device importing takes seconds."""

from __future__ import annotations

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
