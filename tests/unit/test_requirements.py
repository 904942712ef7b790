"""The lock files say what pyproject.toml asks for, for every machine, and nothing about the machine that wrote them."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STALE = "run `make lock`"
EXTRAS = ("all", "edge", "gateway")
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>\S+?)(?: ; (?P<marker>.+))?")
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
# The machines the lock is made for. A marker that is false on all of them is not ours to check.
MACHINES = [
    {"python_version": minor, "python_full_version": f"{minor}.0", "platform_machine": machine}
    for minor in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


class Pin(NamedTuple):
    version: Version
    marker: Marker | None
    hashes: tuple[str, ...]

    def applies(self, machine: dict[str, str]) -> bool:
        return self.marker is None or self.marker.evaluate(dict(machine))


def lock(extra: str) -> dict[str, list[Pin]]:
    """Every pin of a lock file by normalised name; more than one where versions differ by Python."""
    text = (ROOT / "requirements" / f"{extra}.txt").read_text()
    pins: dict[str, list[Pin]] = {}
    joined = re.sub(r" \\\n\s+", " ", text)
    for line in joined.splitlines():
        if not line.strip() or line.lstrip().startswith("#") or line == "--only-binary :all:":
            continue
        pin, *hashes = re.split(r" (?=--hash=)", line)
        match = PIN.fullmatch(pin)
        assert match, f"requirements/{extra}.txt has a line that is no pin: {line!r}"
        assert all(HASH.fullmatch(h) for h in hashes)
        marker = Marker(match["marker"]) if match["marker"] else None
        pins.setdefault(match["name"], []).append(Pin(Version(match["version"]), marker, tuple(hashes)))
    return pins


def asked_for(extra: str) -> list[Requirement]:
    """The direct requirements of an extra, the base dependencies included."""
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            found += [r for included in sorted(requirement.extras) for r in asked_for(included)]
        else:
            found.append(requirement)
    return found


def missing(requirement: Requirement, pins: dict[str, list[Pin]]) -> bool:
    """Whether some machine that needs this requirement finds no pin that satisfies it."""
    for machine in MACHINES:
        if requirement.marker is None or requirement.marker.evaluate({**machine, "extra": ""}):
            candidates = pins.get(canonicalize_name(requirement.name), [])
            if not any(p.applies(machine) and requirement.specifier.contains(p.version, True) for p in candidates):
                return True
    return False


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_lock_satisfies_pyproject(extra: str) -> None:
    """Mutants tried: a requirement added to pyproject.toml; a lower bound raised above the pin."""
    pins = lock(extra)
    assert [str(r) for r in asked_for(extra) if missing(r, pins)] == [], STALE


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_locked_packages_need_is_locked_too(extra: str) -> None:
    """Asks the packages installed here, where they are the locked version, so it needs no network.

    Mutants tried: the pin of markdown-it-py taken out, that of botocore changed by hand.
    """
    pins = lock(extra)
    checked, unmet = 0, []
    for name, versions in pins.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if Version(installed.version) in {pin.version for pin in versions}:
            checked += 1
            unmet += [f"{name} needs {r}" for r in map(Requirement, installed.requires or []) if missing(r, pins)]
    assert unmet == [], STALE
    assert checked >= 8


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_pin_has_hashes(extra: str) -> None:
    assert [name for name, pins in lock(extra).items() if not all(pin.hashes for pin in pins)] == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_lock_names_no_index_and_no_folder(extra: str) -> None:
    text = (ROOT / "requirements" / f"{extra}.txt").read_text()
    assert re.findall(r"https?://|file:|--index|--extra-index|--find-links|--trusted-host|@ ", text) == []


@pytest.mark.parametrize("extra", ["edge", "gateway"])
def test_a_part_gets_the_same_versions_as_the_whole(extra: str) -> None:
    whole = lock("all")
    differing = [
        name
        for name, pins in lock(extra).items()
        if {p.version for p in pins} - {p.version for p in whole.get(name, [])}
    ]
    assert differing == [], STALE


def test_a_device_installs_no_database_and_no_learning_library() -> None:
    # numpy comes with onnxruntime, and is loaded only where models run (tests/unit/test_models_settings.py).
    heavy = {"boto3", "deltalake", "duckdb", "obstore", "onnx", "pydantic", "scikit-learn", "scipy", "skl2onnx"}
    assert heavy & set(lock("edge")) == set()
