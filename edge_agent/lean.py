"""What an agent's process says before it loads its libraries, so that it takes 10 MB less."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import cast


def spare_memory() -> None:
    """Call it first of all, before anything imports pyarrow or structlog.

    Arrow's own heap is for larger work than batches. And structlog loads rich where it is installed, for tracebacks
    that an agent never prints.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if "structlog" in sys.modules or "rich" in sys.modules:
        return
    sys.modules["rich"] = cast(ModuleType, None)  # makes `import rich` fail
    try:
        import structlog  # noqa: F401 - imported now for what it loads
    finally:
        del sys.modules["rich"]
