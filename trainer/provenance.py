"""Which code and which packages made a result."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_GIT_TIMEOUT_S = 10.0
PACKAGES = (
    "duckdb",
    "lightgbm",
    "numpy",
    "onnx",
    "onnxmltools",
    "onnxruntime",
    "optuna",
    "pyarrow",
    "scikit-learn",
    "scipy",
    "skl2onnx",
    "xgboost-cpu",
)
"""Distributions whose version may change a result."""


@cache
def packages() -> dict[str, str]:
    """Versions of the interpreter and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_sha256() -> str:
    """Of the source of this package: two runs with the same value ran the same code of the trainer."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def revision() -> str:
    """Of the whole source: the version that is installed, and in a checkout the commit, `.dirty` where files differ
    from it."""
    try:
        installed = version("headwater")
    except PackageNotFoundError:
        installed = "0"
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return installed
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return installed  # no git here, or not our repository
    return f"{installed}+g{commit}{'.dirty' if changed else ''}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout
