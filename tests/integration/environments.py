"""Environments of their own, for programs that are no dependency of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def installed(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment with these distributions, and nothing of ours."""
    uv = (sys.executable, "-m", "uv", "--quiet")
    python = folder / "venv/bin/python"
    subprocess.run([*uv, "venv", "--python", sys.executable, folder / "venv"], check=True, timeout=120)
    install = [*uv, "pip", "install", "--python", python, *requirements]
    done = subprocess.run(install, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode != 0:
        pytest.skip(f"{requirements[0]} cannot be installed here, so it was not tried: {done.stderr[-500:]}")
    return python
