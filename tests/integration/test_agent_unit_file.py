"""The systemd unit, as systemd itself reads it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_agent.recorder import FINISH_S
from edge_agent.settings import UplinkSettings, load_settings
from edge_agent.supervisor import STALL_S
from edge_agent.uplink import FAREWELL_S

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "systemd" / "headwater-agent.service"


def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser["Service"]


def test_systemd_accepts_every_line_of_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the unit is only checked where it can run")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/headwater/bin/headwater", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_unit_gives_the_agent_the_time_that_it_takes() -> None:
    unit = service()
    assert (unit["Type"], unit["Restart"], unit["NotifyAccess"]) == ("notify", "always", "main")
    assert int(unit["WatchdogSec"]) > STALL_S
    stopping_s = 5 + 2 * FINISH_S + 5 + UplinkSettings().drain_timeout_s + 2 * FAREWELL_S
    assert int(unit["TimeoutStopSec"]) > stopping_s
    assert "adjtimex" in unit["SystemCallFilter"]
    assert "ProtectClock" not in unit


def test_what_the_example_writes_is_where_the_unit_lets_it() -> None:
    unit, settings = service(), load_settings(ROOT / "examples" / "agent" / "raspberry-pi.toml")
    assert Path(settings.buffer.path).parent == Path("/var/lib") / unit["StateDirectory"]
    assert Path(settings.status.socket).parent == Path("/run") / unit["RuntimeDirectory"]
