"""House style that no linter keeps. Print, docstrings, swallowed exceptions and `time.sleep` are left to ruff."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES_MAX = 600
PACKAGES = ("contract", "edge_agent", "gateway", "headwater", "lake", "simulators", "trainer")

# The extras whose distributions a package may import; the base dependencies are everyone's.
EXTRAS_OF = {
    "contract": (),
    "edge_agent": ("edge",),
    "lake": ("gateway",),
    "gateway": ("gateway",),
    "simulators": ("simulators",),
    "trainer": ("trainer", "boosting"),
    "headwater": ("simulators", "trainer"),
}
# Names a package must not have: a room for everything becomes a room for anything.
ATTICS = {"common", "helpers", "misc", "shared", "util", "utils"}
# Written so that this file does not find itself.
FOREIGN = re.compile(
    r"(?<![\w.])/(?:r[o]ot|w[o]rk|h[o]me|Us[e]rs)/\w|/opt/wh[e]els|/opt/py[p]i|py[p]i\.org|python[h]osted\.org"
)
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X])\b")
ISSUE = re.compile(r"#\d+")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```\w*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"\bmake ([a-z][a-z-]*)\b")


@cache
def files(*suffixes: str) -> tuple[Path, ...]:
    """Files of the tree with one of these suffixes (all when none is given), also those not committed yet."""
    listed = subprocess.run(
        # A checkout that belongs to another user, as in many containers, is read all the same.
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    paths = [ROOT / name for name in listed if name and (not suffixes or Path(name).suffix in suffixes)]
    return tuple(path for path in paths if path.is_file())


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts() -> list[tuple[Path, str]]:
    """Everything that people wrote or read as text; the lock files are machine's work with their own test."""
    found = []
    for path in files():
        if path.parent != ROOT / "requirements":
            try:
                found.append((path, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return found


def documents() -> list[tuple[Path, str]]:
    """What describes the tree as it is; a change log also names what is gone."""
    return [(path, text) for path, text in texts() if path.suffix == ".md" and path.name != "CHANGELOG.md"]


def test_modules_stay_small_enough_to_be_read_in_one_sitting() -> None:
    lengths = {shown(path): len(path.read_text().splitlines()) for path in files(".py")}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_MAX} == {}
    assert len(lengths) > 10


def test_unfinished_work_names_its_issue() -> None:
    found = [
        f"{shown(path)}:{number}: {line.strip()}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if UNFINISHED.search(line) and not ISSUE.search(line)
    ]
    assert found == []


def test_no_package_is_an_attic() -> None:
    names = {part.removesuffix(".py") for path in files(".py") for part in path.relative_to(ROOT).parts}
    assert names & ATTICS == set()


def test_nothing_in_the_tree_knows_the_machine_it_was_written_on() -> None:
    found = [
        f"{shown(path)}:{number}: {line.strip()}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if FOREIGN.search(line)
    ]
    assert found == []


def test_every_package_is_typed_and_ships() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert sorted(wheel["packages"]) == sorted(PACKAGES)
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []


def imported(path: Path) -> set[str]:
    """Top-level names of every absolute import in the module, also those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def declared(extras: tuple[str, ...]) -> set[str]:
    """Normalised names of the base dependencies and of these extras, with the extras they include."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]
    names = set()
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            names |= declared(tuple(sorted(requirement.extras)))
        else:
            names.add(canonicalize_name(requirement.name))
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_its_extra_installs(package: str) -> None:
    """`pip install headwater[edge]` is enough for the agent, and so on.

    Mutants tried: `import duckdb` in an edge_agent module; psutil taken out of the extra `edge`.
    """
    distributions = packages_distributions()
    allowed = declared(EXTRAS_OF[package])
    strangers = {}
    for path in files(".py"):
        if path.is_relative_to(ROOT / package):
            for name in imported(path) - sys.stdlib_module_names - set(PACKAGES):
                if not {canonicalize_name(d) for d in distributions.get(name, [name])} & allowed:
                    strangers[shown(path)] = name
    assert strangers == {}


def test_links_in_the_documentation_lead_somewhere() -> None:
    broken = [
        f"{shown(path)}: {target}"
        for path, text in documents()
        for target in LINK.findall(text)
        if not re.match(r"#|\w+:", target) and not (path.parent / target.partition("#")[0]).exists()
    ]
    assert broken == []


def test_files_named_in_the_documentation_exist() -> None:
    """A path in backticks that begins with a folder of ours (`lake/…`) is a promise that the file is there."""
    folders = {path.relative_to(ROOT).parts[0] for path in files() if path.parent != ROOT}
    broken = [
        f"{shown(path)}: {code}"
        for path, text in documents()
        for code in CODE.findall(text)
        if re.fullmatch(r"[\w.-]+/[\w./-]*", code) and code.split("/")[0] in folders and not (ROOT / code).exists()
    ]
    assert broken == []


def test_make_targets_named_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        f"{shown(path)}: make {target}"
        for path, text in documents()
        for code in CODE.findall(text) + FENCE.findall(text)
        for target in MAKE.findall(code)
        if target not in targets
    }
    assert named == set()
