"""docs/gateway.md, the example and the unit file say what the program does: every key, every metric, every reason."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from contract.errors import Reason
from gateway.app import Gateway
from gateway.settings import GatewaySettings, parse_settings

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/gateway.md").read_text()
EXAMPLE = (ROOT / "examples/gateway.toml").read_text()


def keys(kind: Any = GatewaySettings, table: str = "") -> dict[str, Any]:
    """`table.key` → default, of every key that is no table."""
    found = {}
    hints = get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        inner = hints[field.name]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            found |= keys(inner, field.encode_name)
        else:
            found[f"{table}.{field.encode_name}".lstrip(".")] = field.default
    return found


def section(table: str) -> str:
    """The part of the documentation about a table of the file."""
    heading = f"### [{table}]" if table else "## gateway.toml"
    return DOCS.split(heading, 1)[1].split("\n#", 1)[0]


@pytest.mark.parametrize("key", keys())
def test_every_key_is_documented_and_in_the_example(key):
    table, _, name = key.rpartition(".")
    assert f"`{name}`" in section(table)
    part = EXAMPLE.split(f"[{table}]")[-1] if table else EXAMPLE
    assert re.search(rf"^#?{name} = ", part.split("\n[", 1)[0], re.MULTILINE)


def test_the_example_works_and_its_comments_show_the_defaults():
    settings = parse_settings(tomllib.loads(EXAMPLE), source="example", folder=Path("/"))
    assert settings.lake.url.startswith("file:///")
    table = ""
    defaults = keys()
    for line in EXAMPLE.splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            table = found[1]
        elif found := re.match(r"#(\w+) = ([^#]+)", line):
            key = f"{table}.{found[1]}".lstrip(".")
            # Where there is no default worth showing, the example shows what one might write.
            if defaults[key] not in ("", msgspec.NODEFAULT):
                assert tomllib.loads(f"x = {found[2]}")["x"] == defaults[key], key


def test_every_metric_is_documented_and_none_that_does_not_exist(tmp_path):
    settings = parse_settings(
        {"broker": {"url": "mqtt://b"}, "lake": {"url": f"file://{tmp_path}"}}, source="test", folder=tmp_path
    )
    prefix = "headwater_gateway_"
    real = set()
    for metric in Gateway(settings, {}).metrics.registry.collect():
        name = metric.name.removeprefix(prefix)
        assert metric.name.startswith(prefix)
        assert metric.documentation
        real.add(f"{name}_total" if metric.type == "counter" else name)
    bounds = {name for name in real if name.endswith("_max") and name.removesuffix("_max") in real}
    table = DOCS.split("## Metrics", 1)[1]
    told = set(re.findall(r"`(\w+)(?:\{[\w,]+\})?`", "\n".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    assert told == real - bounds


def test_every_reason_is_documented():
    table = DOCS.split("## Bad input", 1)[1].split("\n## ", 1)[0]
    for reason in Reason:
        assert f"`{reason}`" in table


def test_the_unit_leaves_time_to_drain_and_memory_to_flush():
    unit = (ROOT / "deploy/systemd/headwater-gateway.service").read_text()
    stop_s = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert stop_s >= keys()["drain_timeout_s"] + 10
    high = int(re.search(r"^MemoryHigh=(\d+)G$", unit, re.MULTILINE)[1])
    assert high * 2**30 >= 150e6 + keys()["memory_bytes_max"] + 300e6 * keys()["flush_workers"]
