"""Which code and which packages made a result."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
