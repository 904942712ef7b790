"""How a process of ours starts another of ours, wherever it stands and however it is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import headwater


def command(module: str, *arguments: str) -> tuple[str, ...]:
    """The argument vector that runs one of our modules."""
    # -P: a folder in the current one that is named like one of our packages must not be taken for it.
    return (sys.executable, "-P", "-m", module, *arguments)


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment, so that our packages are found also in a checkout that is not installed."""
    root = Path(headwater.__file__).parents[1]
    if root.name in ("site-packages", "dist-packages"):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), present.get("PYTHONPATH", ""))))}
