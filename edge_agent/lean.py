"""What an agent's process says before it loads its libraries, so that it takes up to 20 MB less."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import cast

WITHOUT_NUMPY = frozenset({"host", "hwmon", "iio", "replay"})
"""Drivers that hand over no numpy arrays. The extra `edge` installs numpy for models; these work without it."""


def spare_memory(config: Path) -> None:
    """Call it first of all, before anything imports pyarrow or structlog.

    Arrow's own heap is for larger work than batches (4 MB). structlog loads rich where it is installed, for tracebacks
    that an agent never prints (6 MB), and asyncio, for methods that nobody awaits here (1 MB). pyarrow loads numpy
    where it is installed (11 MB); it is kept from that for good where no driver can want it.

    Args:
        config: the agent.toml, only looked at for its drivers; what is wrong with it is told later.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if "pyarrow" not in sys.modules and _drivers(config) <= WITHOUT_NUMPY:
        _forbid("numpy")
    if not {"structlog", "rich", "asyncio"} & sys.modules.keys():
        _forbid("rich")
        sys.modules["asyncio"] = ModuleType("asyncio")  # structlog needs the name; the real one is there for others
        try:
            import structlog  # noqa: F401 - imported now for what it loads
        finally:
            del sys.modules["rich"], sys.modules["asyncio"]


def give_back_memory() -> None:
    """Let the system have what importing or loading has left behind (glibc; elsewhere nothing happens)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        gc.collect()
        libc.malloc_trim(0)


def _forbid(module: str) -> None:
    """Make importing it fail, as if it were not installed."""
    sys.modules[module] = cast(ModuleType, None)


def _drivers(config: Path) -> set[str]:
    try:
        tables = tomllib.loads(config.read_text(encoding="utf-8"))
        if "models" in tables:
            return {"unknown"}  # windows are numpy's, whatever the drivers hand over
        return {str(table["driver"]) for table in tables["streams"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"unknown"}
