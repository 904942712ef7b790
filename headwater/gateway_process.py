"""The process of a gateway: settings from its file, then `gateway.app` until the end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from gateway.app import run_gateway
from gateway.settings import load_settings


def run_gateway_process(config: Path, *, json_logs: bool) -> int:
    """Run a gateway to its end.

    Returns:
        The exit status: 0 after a stop that was asked for, 1 when a part died.

    Raises:
        HeadwaterError: as `run_gateway`.
    """
    settings = load_settings(config)
    if json_logs:
        settings = msgspec.structs.replace(settings, log=msgspec.structs.replace(settings.log, format="json"))
    return run_gateway(settings)
