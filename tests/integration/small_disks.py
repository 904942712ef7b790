"""Small file systems of one's own. Mounting them needs root; without it the test is skipped, and says so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def mounted(what: list[str], where: Path) -> None:
    """Mount a file system on a new folder."""
    where.mkdir(exist_ok=True)
    or_skip(["mount", *what, str(where)])


def or_skip(command: list[str]) -> None:
    """Run a command that may need rights which this process does not have."""
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        pytest.skip(f"a small file system cannot be made here ({said.decode().strip()[:120]}); run as root on Linux")


def unmounted(where: Path) -> None:
    """Unmount it, lazily: a failing test has files open still."""
    subprocess.run(["umount", "-l", str(where)], check=True, capture_output=True)
